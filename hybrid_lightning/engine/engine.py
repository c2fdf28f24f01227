"""`Engine`: the one object by which other parts of this project compute with a causal language model.

    engine = Engine(model)
    token_logprobs(engine, sequences, temperature)           an update: prompts shared, no padding, no logits of all tokens
    with engine.sampling(dtype):                             a rollout: weights do not change meanwhile
        decoding_of(engine, ids, mask, max_new_tokens)

Whoever makes the model makes its engine and hands it on.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hybrid_lightning.engine.attention import AttentionCalls, Packing
from hybrid_lightning.engine.attention_hook import try_packing
from hybrid_lightning.engine.backend import Backend
from hybrid_lightning.engine.decoder import FastDecoder, Pass
from hybrid_lightning.engine.decoder_layers import known_layers
from hybrid_lightning.engine.passes import base_model, own_hidden
from hybrid_lightning.engine.prepacked import prepacked_weights


class Engine:
    """A causal language model with fast passes.

    Args:
        model: Adapted or not.
        backend: Of its fused layers; None for a model that has none yet.
    """

    def __init__(self, model: nn.Module, backend: Backend | None = None) -> None:
        self.model = model
        self.backend = backend or Backend()
        self._calls: AttentionCalls | None = None  # what the layers ask of attention, if the model can be packed
        self._tried = False
        self._fast = FastDecoder()
        self._pass: Pass | None = None

    def of(self, adapted: nn.Module) -> "Engine":
        """The engine of the same model with an adapter in it, which needs no new trial."""
        engine = Engine(adapted, self.backend)
        engine._calls, engine._tried, engine._fast = self._calls, self._tried, self._fast
        return engine

    def prepare(self) -> None:
        """Find out by a few tokens whether the model can be packed; on sharded weights, on all ranks together.

        It is done once, at the latest before the first pass.
        """
        if not self._tried:
            self._calls, self._tried = try_packing(self.model, self.backend), True

    @property
    def packs(self) -> bool:
        """Whether sequences are packed, after `prepare`."""
        assert self._tried, "the engine has to be prepared first"
        return self._calls is not None

    def hidden(self, ids: Tensor, positions: Tensor, packing: Packing) -> Tensor:
        """Hidden states [N, H] before the output layer of N tokens in one row.

        Args:
            ids: [N].
            positions: [N].
            packing: Who attends to whom.
        """
        if self._pass is not None and not torch.is_grad_enabled():
            return self._pass(ids, positions, packing)
        with self.backend.in_pass():
            return own_hidden(self.model, ids, positions, packing)

    @contextmanager
    def sampling(self, dtype: torch.dtype | None = None) -> Iterator[None]:
        """Within this context weights do not change, so that what products need of them is made once, and layers are plain calls.

        Args:
            dtype: Of the products; None takes that of each weight.
        """
        self.prepare()
        decoder = base_model(self.model).get_decoder()
        layers = None if self._calls is None else known_layers(decoder, self._calls, self.backend)
        together = [part for layer in layers or () for part in layer.same_input()]
        with prepacked_weights(self.model, self.backend, dtype, together):
            self._pass = None if layers is None else self._fast.new_pass(self.model, layers, self.backend)
            try:
                yield
            finally:
                self._pass = None
