"""Decoder layers whose computation is known: those that compute what Llama's, Mistral's, Qwen2's or Qwen3's do.

They are recognised by the words of their forward passes, which transformers' model files repeat. Where somebody watches the
modules' calls, as FSDP does, they are not known, since they have to be called.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from hybrid_lightning.adapters.lean_layers import LeanMLP, LeanRMSNorm, is_watched
from hybrid_lightning.adapters.lean_rotary import Rotary
from hybrid_lightning.adapters.words import words
from hybrid_lightning.rollout.attention import AttentionSettings

_MODELS = (LlamaModel, Qwen2Model, MistralModel)
# Kinds of attention layers, and where each has its sliding window.
_WINDOWS: dict[type[nn.Module], Callable[[Any], int | None]] = {
    LlamaAttention: lambda layer: None,
    Qwen2Attention: lambda layer: layer.sliding_window,
    Qwen3Attention: lambda layer: layer.sliding_window,
    MistralAttention: lambda layer: getattr(layer.config, "sliding_window", None),
}


class KnownLayer(NamedTuple):
    """What a decoder layer consists of."""

    norms: tuple[LeanRMSNorm, LeanRMSNorm]  # before attention and before the MLP
    queries_keys_values: list[nn.Module]
    head_norms: tuple[LeanRMSNorm, LeanRMSNorm] | None  # of queries and keys
    rotary: Rotary
    window: int | None
    settings: AttentionSettings
    head_size: int
    output: nn.Module
    mlp: LeanMLP


def known_layers(decoder: Any) -> list[KnownLayer] | None:
    """The decoder's layers; None unless all of it is known, and nobody watches."""
    if _computes_as(decoder, _MODELS) is None or not isinstance(decoder.norm, LeanRMSNorm):
        return None
    if _has_any_global_hook() or is_watched(decoder) or is_watched(decoder.norm):
        return None
    layers = [_layer(layer) for layer in decoder.layers[: decoder.config.num_hidden_layers]]
    known = [layer for layer in layers if layer is not None]
    return known if len(known) == len(layers) else None


def _layer(layer: Any) -> KnownLayer | None:
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
    return KnownLayer(
        norms,
        projections[:3],
        head_norms,
        inspect.unwrap(type(attention).forward).__globals__["apply_rotary_pos_emb"],
        _WINDOWS[kind](attention),
        AttentionSettings(scaling=attention.scaling),
        attention.head_dim,
        projections[3],
        mlp,
    )


def _computes_as(module: nn.Module, known: Iterable[type[nn.Module]]) -> type[nn.Module] | None:
    """Which of some classes has the same forward pass as a module of transformers, in the same words."""
    if not type(module).__module__.startswith("transformers."):
        return None
    return next((kind for kind in known if words(kind.forward) == words(type(module).forward)), None)
