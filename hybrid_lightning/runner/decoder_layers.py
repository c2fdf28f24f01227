"""Decoder layers with known computation: layers that compute the same as Llama's, Mistral's, Qwen2's or Qwen3's.

They are recognised by their classes and parts, and then have to pass a trial (`decoder.py`). A layer with hooks does not count as
known, since its modules have to be called as modules. FSDP's wrappers do not matter: they gather weights, which are already
unsharded wherever layers are computed this way (`ModelRunner.sampling`).

On accelerators torch compiles two functions per layer: the computation before attention and after it. Uncompiled, a token of a
layer takes some seventy small operations there, and each takes longer to launch than to compute. The first function also writes
keys and values to the cache, and the second combines the attention to two runs of keys, so that decoding calls nothing but
attention's kernels between them. The functions take only tensors, and each set of projections with the same input gets LoRA,
possibly of zeros. So all layers of a model share the code compiled for the first one: layers with LoRA of any rank, and fully
trained layers.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import tree_leaves
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralDecoderLayer, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3Model

from hybrid_lightning.runner.attention import AttentionCalls, AttentionSettings
from hybrid_lightning.runner.backend import Backend, autocast_dtype
from hybrid_lightning.runner.compiling import Axes, Code, compiled
from hybrid_lightning.runner.fused_attention import rotary
from hybrid_lightning.runner.fused_layers import FusedMLP, FusedRMSNorm, hooks_of
from hybrid_lightning.runner.fused_layers import norm as llama_norm
from hybrid_lightning.runner.fused_lora import FusedLora
from hybrid_lightning.runner.prepacked import ProductFactors, product_factors, products_together
from hybrid_lightning.runner.segments import grouped, joined_results, ungrouped

_DECODERS = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)
_FEWEST = 2  # rank of LoRA that is compiled
LAYERS: dict[type[nn.Module], type[nn.Module]] = {  # known layers -> their attention
    LlamaDecoderLayer: LlamaAttention,
    MistralDecoderLayer: MistralAttention,
    Qwen2DecoderLayer: Qwen2Attention,
    Qwen3DecoderLayer: Qwen3Attention,
}


class UnknownLayerError(Exception):
    """A decoder's layers cannot be computed as direct calls; the message gives the cause."""


class KnownLayer(NamedTuple):
    """The parts of a decoder layer."""

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
    """The parts of a decoder's layers.

    Args:
        decoder: The decoder.
        calls: The layers' recorded requests to attention.
        backend: The backend of the fused layers.

    Raises:
        UnknownLayerError: If a part of the decoder is unknown, or a module has hooks.
    """
    if type(decoder) not in _DECODERS:
        blocks = getattr(decoder, "layers", None) or getattr(decoder, "h", None) or [decoder]
        raise UnknownLayerError(f"{type(blocks[0]).__name__} is not known")
    _check_fused(decoder.norm)
    if _has_any_global_hook():
        raise UnknownLayerError("torch has global hooks on all modules")
    _check_unwatched(decoder, decoder.norm)
    pairs = zip(decoder.layers[: decoder.config.num_hidden_layers], calls.settings, strict=True)
    return [_known_layer(layer, backend, settings) for layer, settings in pairs]


def _known_layer(layer: Any, backend: Backend, settings: AttentionSettings) -> KnownLayer:
    kind = own_class(layer)
    if kind not in LAYERS:
        raise UnknownLayerError(f"{kind.__name__} is not known; a strategy may have wrapped it")
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
    """The class of a layer in transformers, without the class that FSDP2 may have placed before it."""
    return type(layer).__bases__[1] if isinstance(layer, FSDPModule) else type(layer)


def _check_unwatched(*modules: nn.Module) -> None:
    for module in modules:
        gathers: Any = module._get_fsdp_state() if isinstance(module, FSDPModule) else None
        if any(gathers is None or getattr(hook, "__self__", None) is not gathers for hook in hooks_of(module)):
            raise UnknownLayerError(f"hooks watch the calls of {own_class(module).__name__}")


class Norm(NamedTuple):
    """A root mean square norm."""

    weight: Tensor  # [n]
    eps: float


class Projections(NamedTuple):
    """Linear layers with the same input: y = x W' + b + (x A') s B' for each, concatenated.

    Two products compute the LoRA of all layers: their A' are concatenated, and their s B' form a block-diagonal matrix. All are
    transposed in advance: in compiled code each transposed view costs the host half a microsecond per token.
    """

    weights: tuple[Tensor, ...]  # W' of each, [n, m]
    biases: tuple[Tensor | None, ...]  # b of each, [m]
    lora_a: Tensor | None  # A' of all, [n, r of all]
    lora_b: Tensor | None  # s B' of all, [r of all, m of all]


class BeforeAttention(NamedTuple):
    """The parts of a layer that compute queries, keys and values."""

    norm: Norm
    projections: Projections
    head_norms: tuple[Norm, Norm] | None  # of queries and keys
    head_size: int


class AfterAttention(NamedTuple):
    """The parts of a layer that compute its output from attention's result."""

    output: Projections
    norm: Norm
    gate_and_up: Projections
    down: Projections


def before_attention(
    hidden: Tensor, cosines: Tensor, sines: Tensor, places: Tensor, keys: Tensor, values: Tensor, layer: BeforeAttention
) -> Tensor:
    """Queries [N R, K, D] (see `grouped`) from hidden states [N, n] and rotary embeddings [N, D] with `signed` sines.

    Writes the tokens' keys and values to `places` [N] in the buffers `keys` and `values` [M, K, D].
    """
    groups = keys.shape[1]
    heads = _project(_normed(hidden, layer.norm), layer.projections).unflatten(1, (-1, layer.head_size))
    query, key, value = heads.split([heads.shape[1] - 2 * groups, groups, groups], dim=1)
    if layer.head_norms is not None:
        query, key = _normed(query, layer.head_norms[0]), _normed(key, layer.head_norms[1])
    keys.index_copy_(0, places, _rotated(key, cosines, sines).to(keys.dtype))
    values.index_copy_(0, places, value.to(values.dtype))
    return grouped(_rotated(query, cosines, sines).to(keys.dtype), groups)


def after_attention(
    hidden: Tensor, one: Tensor, one_sum: Tensor, other: Tensor, other_sum: Tensor, layer: AfterAttention
) -> Tensor:
    """Hidden states [N, n] after the layer, from the states before it and the attention of grouped queries to two runs of keys.

    Each run's result is [N R, K, D], with log-sum-exps [K, N R] (see `Attended`).
    """
    repeats = layer.output.weights[0].shape[0] // one[0].numel()
    attended = ungrouped(joined_results.plain(one, one_sum, other, other_sum)[0], repeats).flatten(1)
    hidden = hidden + _project(attended, layer.output)
    gate, up = _project(_normed(hidden, layer.norm), layer.gate_and_up).chunk(2, dim=1)
    return hidden + _project(F.silu(gate) * up, layer.down)


def _project(x: Tensor, layers: Projections) -> Tensor:
    """[N, n] -> [N, m of all layers], in the dtype of the weights or of autocast."""
    results = []
    for weight, bias in zip(layers.weights, layers.biases, strict=True):
        rows = x.to(weight.dtype)
        results.append(rows @ weight if bias is None else torch.addmm(bias, rows, weight))
    result = torch.cat(results, dim=1) if len(results) > 1 else results[0]  # compiled products write straight into it
    if layers.lora_a is None or layers.lora_b is None:
        return result
    low = x.to(layers.lora_a.dtype) @ layers.lora_a
    return torch.addmm(result, low.to(result.dtype), layers.lora_b.to(result.dtype))


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Queries or keys [N, heads, D] with rotary embeddings, given `signed` sines."""
    return x * cosines[:, None] + x.roll(x.shape[-1] // 2, dims=-1) * sines[:, None]


def signed(sines: Tensor) -> Tensor:
    """Sines [N, D] with a negated first half, so that the same products rotate both halves of x."""
    first, second = sines.chunk(2, dim=-1)
    return torch.cat([-first, second], dim=-1)


def _normed(x: Tensor, norm: Norm) -> Tensor:
    return llama_norm.plain(x, norm.weight, norm.eps)[0]


_ROWS: Axes = {0: "rows"}
_ROOM: Axes = {0: "room"}


class PlainLayer:
    """A layer as direct calls of its parts."""

    def __init__(self, known: KnownLayer) -> None:
        self.known, self.settings = known, known.settings
        self.queries_keys_values = products_together(known.queries_keys_values)
        self.gate_and_up = products_together([known.mlp.gate_proj, known.mlp.up_proj])

    def heads(self, hidden: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [N, H, D], keys [N, K, D] and values [N, K, D] for hidden states [N, n]; cosines and sines are [N, D]."""
        known, shape = self.known, (len(hidden), -1, self.known.head_size)
        query, key, value = (part.view(shape) for part in self.queries_keys_values(known.norms[0].forward(hidden)))
        if known.head_norms is not None:
            query, key = known.head_norms[0].forward(query), known.head_norms[1].forward(key)
        return *rotary(known.backend, query, key, *angles), value

    def output(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Hidden states [N, n] after the layer, from the states before it and attention's result [N, H D]."""
        known = self.known
        hidden = hidden + known.output(attended)
        gate, up = self.gate_and_up(known.norms[1].forward(hidden))
        return hidden + known.mlp.down_proj(known.mlp.activated(gate, up))


class CompiledLayer:
    """A layer as compiled `before_attention` and `after_attention`, while weights do not change.

    Decoding calls `before` and `after` directly. Other passes call `heads` and `output`, as with `PlainLayer`.
    """

    def __init__(self, known: KnownLayer, before: BeforeAttention, after: AfterAttention) -> None:
        self.settings = known.settings
        queries, keys = (weight.shape[1] // before.head_size for weight in before.projections.weights[:2])
        self._backend, self._heads, self._repeats, self._size = known.backend, keys, queries // keys, before.head_size
        self._dtype = before.projections.weights[2].dtype  # of values, without autocast
        found: tuple[Axes, Axes] = ({0: ("rows", self._repeats)}, {1: ("rows", self._repeats)})
        self.before = _Body(before_attention, before, (_ROWS, _ROWS, _ROWS, _ROWS, _ROOM, _ROOM))
        self.after = _Body(after_attention, after, (_ROWS, *found, *found))

    def heads(self, hidden: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [N, H, D], keys [N, K, D] and values [N, K, D], for any kind of attention."""
        count, dtype = hidden.shape[0], autocast_dtype(hidden.device) or self._dtype
        values = hidden.new_empty(count, self._heads, self._size, dtype=dtype)
        keys = torch.empty_like(values, dtype=self._backend.key_dtype(values))
        places = torch.arange(count, device=hidden.device)
        query = self.before(hidden, angles[0], signed(angles[1]), places, keys, values)
        return ungrouped(query, self._repeats), keys, values

    def output(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Hidden states [N, n] after the layer, from the states before it and attention's result [N, H D]."""
        found = grouped(attended.unflatten(1, (-1, self._size)), self._heads).contiguous()
        sums = found.new_zeros(found.shape[1::-1], dtype=torch.float32)
        # There is no second run of keys: log-sum-exps of minus infinity give its result no weight.
        return self.after(hidden, found, sums, -found, sums - torch.inf)


LayerParts = PlainLayer | CompiledLayer


class _Body:
    """A compiled function of rows, with changing `axes`, and of one layer's weights. Its code is looked up once."""

    def __init__(self, function: Callable[..., Any], layer: NamedTuple, axes: Sequence[Axes]) -> None:
        self.function, self.layer, self.axes = function, layer, [*axes]
        self.weights = [part for part in tree_leaves(layer) if isinstance(part, Tensor)]
        self.ranks: list[int] = []
        for part in tree_leaves(layer, is_leaf=lambda part: isinstance(part, Projections)):
            own = part._asdict() if isinstance(part, Projections) else {"": part}
            axis = {"lora_a": {1: f"rank {len(self.ranks)}"}, "lora_b": {0: f"rank {len(self.ranks)}"}}
            for name, leaves in own.items():
                self.axes += [axis.get(name, {}) for leaf in tree_leaves(leaves) if isinstance(leaf, Tensor)]
            if isinstance(part, Projections) and part.lora_a is not None:
                self.ranks.append(part.lora_a.shape[1])
        self._room = axes.index(_ROOM) if _ROOM in axes else None  # the first tensor with this axis
        self.code: Code | None = None
        self._sizes: list[int] = []  # of the last call: number of rows, space for keys, ranks
        self._fits = False  # whether the code fits these sizes

    def __call__(self, *rows: Tensor) -> Any:
        sizes = [rows[0].shape[0], *self.ranks]
        if self._room is not None:
            sizes.insert(1, rows[self._room].shape[0])
        if sizes != self._sizes:
            if self.code is None and sizes[0] > 1:
                self.code = compiled(self.function, (*rows, self.layer), self.axes)
            self._fits, self._sizes = self.code is not None and self.code.fits(*sizes), sizes
        if self.code is None or not self._fits:
            return self.function(*rows, self.layer)
        return self.code.run(*sizes, *rows, *self.weights)


def compiled_layers(layers: list[KnownLayer], all_layers: list[KnownLayer]) -> list[CompiledLayer] | None:
    """These layers in compiled form; None if one has a projection that is not plain, for example a quantized one.

    If any layer of the model has LoRA, the others get LoRA of zeros, which does not change their numbers.
    """
    sets = [[0, 1, 2], [3], [4, 5], [6]]  # projections with the same input
    adapted = [any(isinstance(projections(layer)[place], FusedLora) for layer in all_layers for place in some) for some in sets]
    parts = []
    for layer in layers:
        factors = [product_factors(module) for module in projections(layer)]
        found = [factor for factor in factors if factor is not None]
        if len(found) < len(factors):
            return None
        heads, output, gate_and_up, down = (
            _projections([found[place] for place in some], lora) for some, lora in zip(sets, adapted, strict=True)
        )
        head_norms = None if layer.head_norms is None else (_norm(layer.head_norms[0]), _norm(layer.head_norms[1]))
        before = BeforeAttention(_norm(layer.norms[0]), heads, head_norms, layer.head_size)
        after = AfterAttention(output, _norm(layer.norms[1]), gate_and_up, down)
        parts.append(CompiledLayer(layer, before, after))
    return parts


def _projections(layers: list[ProductFactors], lora: bool) -> Projections:
    """With `lora` all layers get LoRA, possibly of zeros, with rank 2 at least: torch compiles sizes 0 and 1 separately."""
    weights, biases = tuple(factors.weight.T for factors in layers), tuple(factors.bias for factors in layers)
    if not lora:
        return Projections(weights, biases, None, None)
    pairs = [_lora_of(factors) for factors in layers]
    lora_a, lora_b = torch.cat([down for down, _ in pairs]), torch.block_diag(*(up.T for _, up in pairs))
    missing = (0, 0, 0, max(0, _FEWEST - len(lora_a)))
    return Projections(weights, biases, F.pad(lora_a, missing).T.contiguous(), F.pad(lora_b, missing))


def _lora_of(factors: ProductFactors) -> tuple[Tensor, Tensor]:
    """A [r, n] and B [m, r], with rank 0 if the layer has no LoRA."""
    if factors.lora_a is not None and factors.lora_b is not None:
        return factors.lora_a, factors.lora_b
    rows, columns = factors.weight.shape
    return factors.weight.new_empty(0, columns), factors.weight.new_empty(rows, 0)


def adapters_of(layers: list[KnownLayer]) -> list[BaseTunerLayer | ModulesToSaveWrapper]:
    """The adapters in the layers; each can be disabled."""
    modules = [module for layer in layers for module in projections(layer)]
    return [module for module in modules if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper))]


def projections(layer: KnownLayer) -> list[nn.Module]:
    """A layer's projections in the order query, key, value, output, gate, up, down."""
    return [*layer.queries_keys_values, layer.output, layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj]


def _norm(norm: FusedRMSNorm) -> Norm:
    return Norm(norm.weight.detach(), norm.variance_epsilon)
