"""A decoder's forward pass that calls the parts of its layers directly. A rollout runs tens of thousands of layers.

transformers calls a dozen modules per layer. Each looks for hooks, forwards its arguments by name, and slices and transposes its
tensors. On a CPU this overhead costs as much as the arithmetic of a small model's layer. Without it a token of SmolLM2-135M took
0.9 of the time and a token of the embedded policy 0.8, with identical bits. On an accelerator torch compiles each layer except
its attention.

Each model's layers are tried once on a few tokens (`trials.py`). If the numbers differ from transformers' own, the model's own
pass is used.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from hybrid_lightning.runner.attention import Packing
from hybrid_lightning.runner.backend import Backend
from hybrid_lightning.runner.compiling import CompilingError, give_up_compiling, why_not_compiled
from hybrid_lightning.runner.decoder_layers import (
    CompiledLayer,
    KnownLayer,
    LayerParts,
    PlainLayer,
    adapters_of,
    compiled_layers,
    signed,
)
from hybrid_lightning.runner.passes import base_model
from hybrid_lightning.runner.segment_decoding import SegmentDecoding
from hybrid_lightning.runner.trials import why_layers_differ

logger = logging.getLogger(__name__)

Pass = Callable[[Tensor, Tensor, Packing, Tensor | None], Tensor]  # the arguments of `ModelRunner.hidden`


class FastDecoder:
    """Builds the fastest pass of a model that gives the same numbers as its own. One trial decides which.

    Attributes:
        calls_parts: Whether a faster pass than the model's own is used.
        compiles: Whether its layers are compiled.
        why_own: Why the model's own pass has to be used, worded for the user; empty where a faster one is used.
        why_not_compiled: Why its layers are not compiled; empty where they are, or where compiling would not pay.
    """

    def __init__(self) -> None:
        self.why_own = self.why_not_compiled = ""
        self.calls_parts = self.compiles = self._tried = False

    def try_once(self, model: nn.Module, layers: list[KnownLayer], backend: Backend, dtype: torch.dtype | None) -> None:
        """Find out which passes give the model's own numbers. Call before the first pass.

        The model must be in eval mode with unsharded weights, outside `prepacked_weights`. Products have this dtype; None means
        each weight's own.
        """
        if self._tried:
            return
        self._tried = True
        decoder: Any = base_model(model).get_decoder()
        name = type(decoder).__name__

        def compiled_or_plain(known: KnownLayer) -> LayerParts:
            whole = compiled_layers([known], layers)
            if whole is None:
                self.why_not_compiled = "a projection is not a plain layer, for example a quantized one"
            return PlainLayer(known) if whole is None else whole[0]

        if not why_not_compiled(next(decoder.parameters()).device):
            rank_zero_info(f"torch compiles the layers of {name} for sampling, once")
            failure: Exception | str
            try:
                failure = why_layers_differ(decoder, layers, backend, dtype, compiled_or_plain)
            except CompilingError as error:
                failure = error
            if not failure:
                self.calls_parts = self.compiles = True
                return
            self.why_not_compiled = give_up_compiling(f"{name} is sampled from", failure)
        difference = why_layers_differ(decoder, layers, backend, dtype, PlainLayer)
        self.calls_parts = not difference
        if difference:
            self.why_own = f"calling its parts one by one gave {difference}"
            logger.warning(
                "%s is sampled with its own forward pass, which is slower, since %s; "
                "try an older version of transformers: this one may be newer than this project supports",
                name,
                self.why_own,
            )

    def new_pass(self, model: nn.Module, layers: list[KnownLayer], backend: Backend) -> Pass | None:
        """The pass of a model, valid within its `prepacked_weights` block; None if the model's own has to be used."""
        if not self.calls_parts:
            return None
        decoder: Any = base_model(model).get_decoder()
        plain = _pass(decoder, [PlainLayer(layer) for layer in layers], backend)
        whole = compiled_layers(layers, layers) if self.compiles else None
        if whole is None:
            return plain
        compiled, step = _pass(decoder, whole, backend), _step_pass(decoder, whole, backend)
        adapters = adapters_of(layers)

        def hidden_states(ids: Tensor, positions: Tensor, packing: Packing, wanted: Tensor | None) -> Tensor:
            for adapter in adapters:
                if adapter.disable_adapters:
                    return plain(ids, positions, packing, wanted)
            if self.compiles:
                try:
                    if isinstance(packing, SegmentDecoding):
                        return step(ids, positions, packing)
                    return compiled(ids, positions, packing, wanted)
                except CompilingError as error:  # for shapes or dtypes that the trial did not meet
                    self.compiles = False
                    self.why_not_compiled = give_up_compiling(f"{type(decoder).__name__} is sampled from", error)
            return plain(ids, positions, packing, wanted)  # the packing receives the same keys and values again

        return hidden_states


def _pass(decoder: Any, layers: Sequence[LayerParts], backend: Backend) -> Pass:
    last = len(layers) - 1

    def hidden_states(ids: Tensor, positions: Tensor, packing: Packing, wanted: Tensor | None) -> Tensor:
        hidden, angles = _embedded(decoder, ids, positions)
        with backend.in_pass():
            for number, layer in enumerate(layers):
                attended = packing.attend(number, *layer.heads(hidden, angles), layer.settings)
                if wanted is not None and number == last:  # the other tokens only contribute keys and values
                    hidden, attended = hidden[wanted], attended[wanted]
                hidden = layer.output(hidden, attended.flatten(1))
            return decoder.norm.forward(hidden)

    return hidden_states


def _step_pass(
    decoder: Any, layers: Sequence[CompiledLayer], backend: Backend
) -> Callable[[Tensor, Tensor, SegmentDecoding], Tensor]:
    """The pass of one token per row: two compiled functions per layer, and the attention between them."""

    def hidden_states(ids: Tensor, positions: Tensor, decoding: SegmentDecoding) -> Tensor:
        hidden, (cosines, sines) = _embedded(decoder, ids, positions)
        sines = signed(sines)
        with backend.in_pass():
            for number, layer in enumerate(layers):
                query = layer.before(hidden, cosines, sines, decoding.places, *decoding.cache(number))
                shared, own = decoding.attend_to_kept(number, query, layer.settings)
                hidden = layer.after(hidden, *shared, *own)
            return decoder.norm.forward(hidden)

    return hidden_states


def _embedded(decoder: Any, ids: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Hidden states [N, n] before the first layer, and cosines and sines [N, D] of the rotary embeddings."""
    hidden = decoder.embed_tokens(ids)
    cosines, sines = decoder.rotary_emb(hidden[None], positions[None])
    return hidden, (cosines[0].contiguous(), sines[0].contiguous())
