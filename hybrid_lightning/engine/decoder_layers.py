"""Decoder layers whose computation is known: those that compute what Llama's, Mistral's, Qwen2's or Qwen3's do.

They are recognised by their classes and their parts, and a trial then has to give the same numbers (`decoder.py`). A layer with
hooks does not count as known, since its modules have to be called as modules. What FSDP puts around a layer does not matter: it
gathers weights, which are whole already wherever layers are computed in this way (`Engine.sampling`).
"""

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.module import _has_any_global_hook
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralDecoderLayer, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3Model

from hybrid_lightning.engine.attention import AttentionCalls, AttentionSettings
from hybrid_lightning.engine.backend import Backend
from hybrid_lightning.engine.fused_attention import rotary
from hybrid_lightning.engine.fused_layers import FusedMLP, FusedRMSNorm, hooks_of
from hybrid_lightning.engine.prepacked import added_product, products_together

_DECODERS = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)
LAYERS: dict[type[nn.Module], type[nn.Module]] = {  # known layers -> their attention
    LlamaDecoderLayer: LlamaAttention,
    MistralDecoderLayer: MistralAttention,
    Qwen2DecoderLayer: Qwen2Attention,
    Qwen3DecoderLayer: Qwen3Attention,
}


class UnknownLayerError(Exception):
    """Why a decoder's layers cannot be computed as plain calls."""


class KnownLayer(NamedTuple):
    """What a decoder layer consists of."""

    norms: tuple[FusedRMSNorm, FusedRMSNorm]  # before attention and before the MLP
    queries_keys_values: list[nn.Module]
    head_norms: tuple[FusedRMSNorm, FusedRMSNorm] | None  # of queries and keys
    backend: Backend
    settings: AttentionSettings
    head_size: int
    output: nn.Module
    mlp: FusedMLP

    def same_input(self) -> list[list[nn.Module]]:
        """Sets of linear layers with the same input, which are multiplied together."""
        return [self.queries_keys_values, [self.mlp.gate_proj, self.mlp.up_proj]]


def known_layers(decoder: Any, calls: AttentionCalls, backend: Backend) -> list[KnownLayer]:
    """The layers of a decoder, taken apart, whose fused layers have this backend; `calls` is what they ask of attention.

    Raises:
        UnknownLayerError: If a part of the decoder is not known, or a module has hooks.
    """
    if type(decoder) not in _DECODERS:
        blocks = getattr(decoder, "layers", None) or getattr(decoder, "h", None) or [decoder]
        raise UnknownLayerError(f"{type(blocks[0]).__name__} is not known")
    _check_fused(decoder.norm)
    if _has_any_global_hook():
        raise UnknownLayerError("torch has hooks for the calls of all modules")
    _check_unwatched(decoder, decoder.norm)
    asked = zip(decoder.layers[: decoder.config.num_hidden_layers], calls.settings, strict=True)
    return [_known_layer(layer, backend, settings) for layer, settings in asked]


def _known_layer(layer: Any, backend: Backend, settings: AttentionSettings) -> KnownLayer:
    kind = own_class(layer)
    if kind not in LAYERS:
        raise UnknownLayerError(f"{kind.__name__} is not known, as where a strategy has wrapped it")
    attention, mlp, norms = layer.self_attn, layer.mlp, (layer.input_layernorm, layer.post_attention_layernorm)
    if not issubclass(type(attention), LAYERS[kind]):
        raise UnknownLayerError(f"{type(attention).__name__} is not known")
    if attention.training:
        raise UnknownLayerError("attention is in train mode")
    head_norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
    all_norms = (*norms, *(head_norms or ()))
    _check_fused(mlp, *all_norms)
    query_key_value = [attention.q_proj, attention.k_proj, attention.v_proj]
    known = KnownLayer(norms, query_key_value, head_norms, backend, settings, attention.head_dim, attention.o_proj, mlp)
    _check_unwatched(layer, attention, mlp, *all_norms, *projections(known))
    return known


def _check_fused(*modules: nn.Module) -> None:
    for module in modules:
        if not isinstance(module, (FusedMLP, FusedRMSNorm)):
            raise UnknownLayerError(f"{type(module).__name__} is not fused")


def own_class(layer: nn.Module) -> type[nn.Module]:
    """The class of a layer in transformers, also if FSDP2 has put a class before it."""
    return type(layer).__bases__[1] if isinstance(layer, FSDPModule) else type(layer)


def _check_unwatched(*modules: nn.Module) -> None:
    for module in modules:
        gathers: Any = module._get_fsdp_state() if isinstance(module, FSDPModule) else None
        if any(gathers is None or getattr(hook, "__self__", None) is not gathers for hook in hooks_of(module)):
            raise UnknownLayerError(f"hooks watch the calls of {own_class(module).__name__}")


class PlainLayer:
    """A layer by plain calls of its parts."""

    def __init__(self, known: KnownLayer) -> None:
        self.known, self.settings = known, known.settings
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


def projections(layer: KnownLayer) -> list[nn.Module]:
    """Those to queries, keys, values, of attention's result, to gate and up, and back."""
    return [*layer.queries_keys_values, layer.output, layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj]
