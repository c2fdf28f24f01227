"""A decoder's forward pass as plain calls of what its layers consist of, for the tens of thousands of layers of a rollout.

transformers calls a dozen modules a layer, each of which looks for hooks, passes its arguments on by name, and cuts and turns
its tensors. On a CPU that takes as long as a small model's layer computes: without, a token of SmolLM2-135M took 0.9 of the time
and one of the embedded policy 0.8, with the same numbers bit for bit.

Families whose layers compute what Llama's, Mistral's, Qwen2's or Qwen3's do are recognised by the words of their forward passes;
and once for each model its own pass and this one have to give the same. Where somebody watches the modules' calls, as FSDP does,
they are made.
"""

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from hybrid_lightning.adapters.constant_weights import products_together
from hybrid_lightning.adapters.lean_layers import LeanMLP, LeanRMSNorm, is_watched
from hybrid_lightning.adapters.lean_rotary import Rotary, rotary_of_tokens
from hybrid_lightning.adapters.words import words
from hybrid_lightning.kernels.calls import kernels_in_layers
from hybrid_lightning.rollout.attention import AttentionSettings
from hybrid_lightning.rollout.forward import CONSTANT_PASS, base_model, packed_hidden
from hybrid_lightning.rollout.interface import Packing
from hybrid_lightning.rollout.packing import PackedSequences
from hybrid_lightning.rollout.support import supports_packing
from hybrid_lightning.types import Sequences

logger = logging.getLogger(__name__)

_MODELS = (LlamaModel, Qwen2Model, MistralModel)
# Kinds of attention layers, and where each has its sliding window.
_WINDOWS: dict[type[nn.Module], Callable[[Any], int | None]] = {
    LlamaAttention: lambda layer: None,
    Qwen2Attention: lambda layer: layer.sliding_window,
    Qwen3Attention: lambda layer: layer.sliding_window,
    MistralAttention: lambda layer: getattr(layer.config, "sliding_window", None),
}
_agree: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@contextmanager
def constant_decoder(model: nn.Module) -> Iterator[None]:
    """Within this context, where weights do not change, `packed_hidden` goes through the decoder by plain calls if it is known.

    Args:
        model: Causal language model, within `constant_weights` and in eval mode.
    """
    decoder = base_model(model).get_decoder()
    layers = _layers(decoder) if supports_packing(model) else None
    if layers is None:
        yield
        return
    if decoder not in _agree:
        _agree[decoder] = _gives_the_same(model, decoder, layers)
    if _agree[decoder]:
        decoder.__dict__[CONSTANT_PASS] = _pass(decoder, layers)
    try:
        yield
    finally:
        decoder.__dict__.pop(CONSTANT_PASS, None)


class _Layer(NamedTuple):
    """What a layer computes."""

    norms: tuple[LeanRMSNorm, LeanRMSNorm]  # before attention and before the MLP
    queries_keys_values: Callable[[Tensor], Sequence[Tensor]]
    head_norms: tuple[LeanRMSNorm, LeanRMSNorm] | None  # of queries and keys
    rotary: Rotary
    window: int | None
    settings: AttentionSettings
    head_size: int
    output: Callable[[Tensor], Sequence[Tensor]]
    gate_and_up: Callable[[Tensor], Sequence[Tensor]]
    mlp: LeanMLP
    down: Callable[[Tensor], Sequence[Tensor]]


def _layers(decoder: Any) -> list[_Layer] | None:
    """The decoder's layers; None unless all of it is known, and nobody watches."""
    if _computes_as(decoder, _MODELS) is None or not isinstance(decoder.norm, LeanRMSNorm):
        return None
    if _has_any_global_hook() or is_watched(decoder) or is_watched(decoder.norm):
        return None
    layers = [_layer(layer) for layer in decoder.layers[: decoder.config.num_hidden_layers]]
    known = [layer for layer in layers if layer is not None]
    return known if len(known) == len(layers) else None


def _layer(layer: Any) -> _Layer | None:
    if _computes_as(layer, (LlamaDecoderLayer,)) is None:
        return None
    kind = _computes_as(layer.self_attn, _WINDOWS)
    if kind is None:
        return None
    attention, mlp, norms = layer.self_attn, layer.mlp, (layer.input_layernorm, layer.post_attention_layernorm)
    head_norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
    projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    of_mlp = [mlp.gate_proj, mlp.up_proj, mlp.down_proj] if isinstance(mlp, LeanMLP) else []
    all_norms = (*norms, *(head_norms or ()))
    known = bool(of_mlp) and all(isinstance(norm, LeanRMSNorm) for norm in all_norms) and not attention.training
    if not known or any(is_watched(module) for module in (layer, attention, mlp, *all_norms, *projections, *of_mlp)):
        return None
    return _Layer(
        norms,
        products_together(projections[:3]),
        head_norms,
        inspect.unwrap(type(attention).forward).__globals__["apply_rotary_pos_emb"],
        _WINDOWS[kind](attention),
        AttentionSettings(scaling=attention.scaling),
        attention.head_dim,
        products_together(projections[3:]),
        products_together(of_mlp[:2]),
        mlp,
        products_together(of_mlp[2:]),
    )


def _computes_as(module: nn.Module, known: Iterable[type[nn.Module]]) -> type[nn.Module] | None:
    """Which of some classes has the same forward pass as a module of transformers, in the same words."""
    if not type(module).__module__.startswith("transformers."):
        return None
    return next((kind for kind in known if words(kind.forward) == words(type(module).forward)), None)


def _pass(decoder: Any, layers: list[_Layer]) -> Callable[[Tensor, Tensor, Packing], Tensor]:
    def hidden_states(ids: Tensor, positions: Tensor, packing: Packing) -> Tensor:
        hidden = decoder.embed_tokens(ids)
        cosines, sines = decoder.rotary_emb(hidden[None], positions[None])
        angles = (cosines[0].contiguous(), sines[0].contiguous())
        with kernels_in_layers():
            for number, layer in enumerate(layers):
                hidden = hidden + _attention(number, layer, layer.norms[0].forward(hidden), angles, packing)
                gate, up = layer.gate_and_up(layer.norms[1].forward(hidden))
                hidden = hidden + layer.down(layer.mlp.activated(gate, up))[0]
            result: Tensor = decoder.norm.forward(hidden)
        return result

    return hidden_states


def _attention(number: int, layer: _Layer, x: Tensor, angles: tuple[Tensor, Tensor], packing: Packing) -> Tensor:
    """[N, n] -> [N, n]."""
    shape = (len(x), -1, layer.head_size)
    query, key, value = (part.view(shape) for part in layer.queries_keys_values(x))
    if layer.head_norms is not None:
        query, key = layer.head_norms[0].forward(query), layer.head_norms[1].forward(key)
    query, key = rotary_of_tokens(layer.rotary, query, key, *angles)
    return layer.output(packing.attend(number, query, key, value, layer.window, layer.settings).reshape(len(x), -1))[0]


def _gives_the_same(model: nn.Module, decoder: Any, layers: list[_Layer]) -> bool:
    ids = torch.arange(2, 14, device=next(decoder.parameters()).device).view(2, 6) % decoder.config.vocab_size
    mask = torch.ones_like(ids, dtype=torch.bool)
    packed = PackedSequences(Sequences(ids, mask, ids[:, :0], mask[:, :0]), completions=False)
    with torch.no_grad():
        expected = packed_hidden(model, packed.ids, packed.positions, packed)
        found = _pass(decoder, layers)(packed.ids, packed.positions, packed)
    # Bit for bit on a CPU; products of an accelerator may sum up otherwise for another number of axes.
    off = float((found - expected).double().norm() / expected.double().norm())
    same = found.dtype == expected.dtype and off <= (1e-4 if expected.dtype == torch.float32 else 0.02)
    if not same:
        logger.warning(
            "%s is sampled from by its own forward pass, which takes longer: calling its parts one by one gave other numbers. "
            "This version of transformers may be newer than this project knows",
            type(decoder).__name__,
        )
    return same
