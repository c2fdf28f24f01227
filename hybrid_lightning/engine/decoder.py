"""A decoder's forward pass as plain calls of what its layers consist of, for the tens of thousands of layers of a rollout.

transformers calls a dozen modules per layer, each of which looks for hooks, passes its arguments on by name, and slices and
transposes its tensors. On a CPU that takes as long as a small model's layer computes: without it a token of SmolLM2-135M took 0.9
of the time and one of the embedded policy 0.8, with the same numbers bit for bit. On an accelerator torch compiles all of a layer
but its attention.

Once for each model its layers are tried on a few tokens (`trials.py`). If their numbers are not those of transformers' own,
the model's own pass is used.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from hybrid_lightning.engine.attention import Packing
from hybrid_lightning.engine.backend import Backend
from hybrid_lightning.engine.compiling import CompilingError, compiling_pays, give_up_compiling
from hybrid_lightning.engine.decoder_layers import CompiledLayer, KnownLayer, adapters_of, compiled_layers, signed
from hybrid_lightning.engine.fused_attention import rotary
from hybrid_lightning.engine.passes import base_model
from hybrid_lightning.engine.prepacked import added_product, products_together
from hybrid_lightning.engine.segment_decoding import SegmentDecoding
from hybrid_lightning.engine.trials import why_layers_differ

logger = logging.getLogger(__name__)

Pass = Callable[[Tensor, Tensor, Packing, Tensor | None], Tensor]  # the arguments of `Engine.hidden`
Maker = Callable[[Any, list[KnownLayer], Backend], Pass]


class FastDecoder:
    """Makes the fastest pass of a model that gives the same numbers as its own; which one that is, is tried once.

    Attributes:
        why_own: Why the model's own pass has to be used, in words for the user; empty where there is a faster one.
        why_not_compiled: Why its layers are not compiled; empty where they are, or where that would not pay.
    """

    def __init__(self) -> None:
        self.why_own = self.why_not_compiled = ""
        self._make: Maker | None = None
        self._tried = False

    def assume(self) -> None:
        """Let passes by plain calls give the same numbers without a trial, as for a model without weights."""
        self._make, self._tried = _plain_pass, True

    def try_once(self, model: nn.Module, layers: list[KnownLayer], backend: Backend, dtype: torch.dtype | None) -> None:
        """Find out which passes give the model's own numbers, before the first of them is made.

        Args:
            model: Causal language model in eval mode, whose weights are whole, and not within `prepacked_weights`.
            layers: The layers of its decoder.
            backend: The backend of its fused layers.
            dtype: Dtype of the products; None takes that of each weight.
        """
        if self._tried:
            return
        self._tried = True
        decoder: Any = base_model(model).get_decoder()
        name = type(decoder).__name__

        def compiled_or_plain(known: KnownLayer) -> _PlainLayer | CompiledLayer:
            whole = compiled_layers([known], layers)
            if whole is None:
                self.why_not_compiled = "a projection is of a special kind, such as a quantized one"
            return _PlainLayer(known) if whole is None else whole[0]

        if compiling_pays(next(decoder.parameters()).device):
            rank_zero_info(f"torch compiles the layers of {name} for sampling, once")
            failure: Exception | str
            try:
                failure = why_layers_differ(decoder, layers, backend, dtype, compiled_or_plain)
            except CompilingError as error:
                failure = error
            if not failure:
                self._make = _compiled_pass
                return
            self.why_not_compiled = give_up_compiling(f"{name} is sampled from", failure)
        difference = why_layers_differ(decoder, layers, backend, dtype, _PlainLayer)
        self._make = None if difference else _plain_pass
        if difference:
            self.why_own = f"calling its parts one by one gave {difference}"
            logger.warning(
                "%s is sampled from by its own forward pass, which takes longer, since %s; "
                "try an older version of transformers, as this one may be newer than this project knows",
                name,
                self.why_own,
            )

    def new_pass(self, model: nn.Module, layers: list[KnownLayer], backend: Backend) -> Pass | None:
        """Make the pass, for as long as weights do not change; None if the model's own has to be used.

        Args:
            model: Causal language model in eval mode, within `prepacked_weights`.
            layers: The layers of its decoder.
            backend: The backend of its fused layers.
        """
        decoder = base_model(model).get_decoder()
        if self._make is not _compiled_pass:
            return None if self._make is None else self._make(decoder, layers, backend)
        compiled, plain = _compiled_pass(decoder, layers, backend), _plain_pass(decoder, layers, backend)

        def hidden_states(ids: Tensor, positions: Tensor, packing: Packing, wanted: Tensor | None) -> Tensor:
            if self._make is _compiled_pass:
                try:
                    return compiled(ids, positions, packing, wanted)
                except CompilingError as error:  # for a kind of numbers that the trial had not
                    self._make = _plain_pass
                    self.why_not_compiled = give_up_compiling(f"{type(decoder).__name__} is sampled from", error)
            return plain(ids, positions, packing, wanted)  # the packing gets again what it got before the error

        return hidden_states


class _PlainLayer:
    """A layer by plain calls of its parts."""

    def __init__(self, known: KnownLayer) -> None:
        self.known = known
        self.queries_keys_values = products_together(known.queries_keys_values)
        self.gate_and_up = products_together([known.mlp.gate_proj, known.mlp.up_proj])
        self.add_output = added_product(known.output, known.backend)
        self.add_mlp = added_product(known.mlp.down_proj, known.backend)

    def heads(self, hidden: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [N, H, D], keys [N, K, D] and values [N, K, D] of hidden states [N, n]; cosines and sines are [N, D]."""
        known, shape = self.known, (len(hidden), -1, self.known.head_size)
        query, key, value = (part.view(shape) for part in self.queries_keys_values(known.norms[0].forward(hidden)))
        if known.head_norms is not None:
            query, key = known.head_norms[0].forward(query), known.head_norms[1].forward(key)
        return *rotary(known.backend, query, key, *angles), value

    def output(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Hidden states [N, n] after the layer from those before it, which it may overwrite, and attention's result [N, H D]."""
        hidden = self.add_output(hidden, attended)
        gate, up = self.gate_and_up(self.known.norms[1].forward(hidden))
        return self.add_mlp(hidden, self.known.mlp.activated(gate, up))


def _plain_pass(decoder: Any, layers: list[KnownLayer], backend: Backend) -> Pass:
    return _pass(decoder, layers, [_PlainLayer(layer) for layer in layers], backend)


def _compiled_pass(decoder: Any, layers: list[KnownLayer], backend: Backend) -> Pass:
    plain, whole, adapters = _plain_pass(decoder, layers, backend), compiled_layers(layers, layers), adapters_of(layers)
    if whole is None:
        return plain
    compiled, step = _pass(decoder, layers, whole, backend), _step_pass(decoder, layers, whole, backend)

    def hidden_states(ids: Tensor, positions: Tensor, packing: Packing, wanted: Tensor | None) -> Tensor:
        for adapter in adapters:
            if adapter.disable_adapters:
                return plain(ids, positions, packing, wanted)
        if isinstance(packing, SegmentDecoding):
            return step(ids, positions, packing)
        return compiled(ids, positions, packing, wanted)

    return hidden_states


def _pass(decoder: Any, known: Sequence[KnownLayer], layers: Sequence[_PlainLayer | CompiledLayer], backend: Backend) -> Pass:
    last = len(layers) - 1

    def hidden_states(ids: Tensor, positions: Tensor, packing: Packing, wanted: Tensor | None) -> Tensor:
        hidden, angles = _embedded(decoder, ids, positions)
        with backend.in_pass():
            for number, (kind, layer) in enumerate(zip(known, layers, strict=True)):
                attended = packing.attend(number, *layer.heads(hidden, angles), kind.settings)
                if wanted is not None and number == last:  # of all others only the keys and values are needed
                    hidden, attended = hidden[wanted], attended[wanted]
                hidden = layer.output(hidden, attended.flatten(1))
            result: Tensor = decoder.norm.forward(hidden)
        return result

    return hidden_states


def _step_pass(
    decoder: Any, known: Sequence[KnownLayer], layers: Sequence[CompiledLayer], backend: Backend
) -> Callable[[Tensor, Tensor, SegmentDecoding], Tensor]:
    """The pass of one token of each row: nothing is computed but two functions of each layer and attention between them."""

    def hidden_states(ids: Tensor, positions: Tensor, decoding: SegmentDecoding) -> Tensor:
        hidden, (cosines, sines) = _embedded(decoder, ids, positions)
        sines = signed(sines)
        with backend.in_pass():
            for number, (kind, layer) in enumerate(zip(known, layers, strict=True)):
                query = layer.before(hidden, cosines, sines, decoding.places, *decoding.cache(number))
                shared, own = decoding.attend_to_kept(number, query, kind.settings)
                hidden = layer.after(hidden, *shared, *own)
            result: Tensor = decoder.norm.forward(hidden)
        return result

    return hidden_states


def _embedded(decoder: Any, ids: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Hidden states [N, n] before the first layer, and cosines and sines [N, D] of the rotary embeddings."""
    hidden = decoder.embed_tokens(ids)
    cosines, sines = decoder.rotary_emb(hidden[None], positions[None])
    return hidden, (cosines[0].contiguous(), sines[0].contiguous())
