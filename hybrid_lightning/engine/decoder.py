"""A decoder's forward pass as plain calls of what its layers consist of, for the tens of thousands of layers of a rollout.

transformers calls a dozen modules per layer, each of which looks for hooks, passes its arguments on by name, and slices and
transposes its tensors. On a CPU that takes as long as a small model's layer computes: without it a token of SmolLM2-135M took 0.9
of the time and one of the embedded policy 0.8, with the same numbers bit for bit.

Once for each model a layer of each kind is tried on a few tokens. If its numbers are not those of transformers' own, the model's
own pass is used.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid_lightning.engine.attention import AttentionSettings, Packing
from hybrid_lightning.engine.backend import HALF, Backend
from hybrid_lightning.engine.decoder_layers import KnownLayer, PlainLayer, projections
from hybrid_lightning.engine.fused_lora import FusedLora
from hybrid_lightning.engine.prepacked import prepacked_weights

Pass = Callable[[Tensor, Tensor, Packing, Tensor | None], Tensor]  # the arguments of `Engine.hidden`

_TOKENS = 12  # of a trial
# How far a layer may be off, relative to what it adds to the hidden states: in float32, and where 16 bits round in between.
_TOLERANCE, _TOLERANCE_HALF = 1e-3, 0.1


def fast_pass(decoder: Any, layers: list[KnownLayer], backend: Backend) -> Pass:
    """The pass of a decoder by plain calls, within `prepacked_weights` and for as long as these."""
    plain = [PlainLayer(layer) for layer in layers]
    last = len(plain) - 1

    def hidden_states(ids: Tensor, positions: Tensor, packing: Packing, wanted: Tensor | None) -> Tensor:
        hidden, angles = _embedded(decoder, ids, positions)
        with backend.in_pass():
            for number, layer in enumerate(plain):
                attended = packing.attend(number, *layer.heads(hidden, angles), layer.settings)
                if wanted is not None and number == last:  # of all others only the keys and values are needed
                    hidden, attended = hidden[wanted], attended[wanted]
                hidden = layer.output(hidden, attended.flatten(1))
            return decoder.norm.forward(hidden)

    return hidden_states


def _embedded(decoder: Any, ids: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Hidden states [N, n] before the first layer, and cosines and sines [N, D] of the rotary embeddings."""
    hidden = decoder.embed_tokens(ids)
    cosines, sines = decoder.rotary_emb(hidden[None], positions[None])
    return hidden, (cosines[0].contiguous(), sines[0].contiguous())


def why_layers_differ(decoder: Any, layers: list[KnownLayer], backend: Backend, dtype: torch.dtype | None) -> str:
    """How layers by plain calls give other numbers than transformers' own; empty if they do not.

    Args:
        decoder: The decoder, in eval mode, with whole weights, and not within `prepacked_weights`.
        layers: Its layers, of which the first of each kind is tried: they take different ways by what their projections are.
        backend: Of its fused layers.
        dtype: Dtype of the products; None takes that of each weight.
    """
    kinds = {tuple(map(_kind, projections(layer))): number for number, layer in reversed(list(enumerate(layers)))}
    device = next(decoder.parameters()).device
    ids = torch.randint(decoder.config.vocab_size, (_TOKENS,), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad(), backend.in_pass():
        hidden, angles = _embedded(decoder, ids, torch.arange(_TOKENS, device=device))
        halves = hidden.dtype in HALF or dtype in HALF or torch.is_autocast_enabled(device.type)
        for number in sorted(kinds.values()):
            own = decoder.layers[number]
            given = {"attention_mask": None, "position_embeddings": tuple(part[None] for part in angles)}
            expected = own(hidden[None], **given, packing=_OneSequence())[0]
            with prepacked_weights(own, backend, dtype, layers[number].same_input()):
                layer = PlainLayer(layers[number])
                attended = _OneSequence().attend(0, *layer.heads(hidden, angles), layer.settings)
                found = layer.output(hidden.clone(), attended.reshape(len(hidden), -1))
            off = float((found - expected).float().norm() / (expected - hidden).float().norm())
            if not off <= (_TOLERANCE_HALF if halves else _TOLERANCE):
                return f"other numbers, {off:.2g} of what layer {number} adds to the hidden states"
    return ""


def _kind(module: nn.Module) -> tuple[Any, ...]:
    plain = isinstance(module, FusedLora) and module.plain_adapter() is not None
    return type(module), plain, next(module.parameters()).dtype


class _OneSequence:
    """A `Packing` of one sequence."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """See `Packing`."""
        query, key, value = (part.to(value.dtype).transpose(0, 1)[None] for part in (query, key, value))
        result = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=settings.scaling, enable_gqa=True)
        return result[0].transpose(0, 1)
