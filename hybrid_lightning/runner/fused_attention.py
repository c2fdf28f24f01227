"""Fused attention layers: on a CPU one operator rotates queries and keys, where transformers' own function takes ten.

transformers has no hook for such a function: an attention layer calls `apply_rotary_pos_emb` of its own file, and the kernels
that `use_kernelized_func` installs there come from the hub and are for accelerators. So a layer's class is replaced by a subclass
with our class before it. During a pass of the runner our class computes the same as Llama's: projections, norms of the heads if
there are any, rotation, and a call of transformers' attention interface. At all other times the layer's own forward pass runs.

A trial decides which layers compute the same as Llama's: a small layer of the class and ours have to pass the same bits to the
attention interface, and return the same bits.
"""

import inspect
from collections.abc import Callable, Hashable
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from hybrid_lightning.runner.attention import AttentionSettings
from hybrid_lightning.runner.attention_hook import register_packed
from hybrid_lightning.runner.backend import Backend
from hybrid_lightning.runner.cpu import operators as kernels
from hybrid_lightning.runner.fused_layers import computes_alike, drawn, hooks_of, small_module
from hybrid_lightning.runner.fused_lora import replace_modules
from hybrid_lightning.runner.passes import no_mask

_PROJECTIONS, _HEAD_NORMS = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"}
_CACHE_NAMES = {"cache", "past_key_values"}  # the latter is the older name
# Settings that a layer may have in addition to Llama's -> the option that it then passes to the attention interface.
_MORE_SETTINGS = {"sliding_window": "sliding_window", "attn_logit_softcapping": "softcap"}


class FusedAttention(nn.Module):
    """Base class that is placed before an attention layer's own class (see `_fused`)."""

    backend = Backend()  # without operators, until `replace_modules` sets the model's backend
    own_class: type[nn.Module]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the layer's own class, since the class made from the two cannot be imported by name."""
        return _empty, (self.own_class,), self.__getstate__()

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention's output [B, N, n] for hidden states [B, N, n]; cosines and sines are [B, N, D]. B is 1 in a pass."""
        in_pass = options.get("packing") is not None and all(options.get(name) is None for name in _CACHE_NAMES)
        if not in_pass or position_embeddings is None or position_embeddings[0].shape[-1] != self.head_dim:
            own: Any = super().forward
            return own(hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask, **options)
        module: Any = self
        shape = (hidden_states.shape[1], -1, module.head_dim)
        query, key, value = (part(hidden_states).view(shape) for part in (module.q_proj, module.k_proj, module.v_proj))
        if hasattr(module, "q_norm"):
            query, key = module.q_norm(query), module.k_norm(key)
        query, key = rotary(self.backend, query, key, *(part[0].contiguous() for part in position_embeddings))
        attended = self.attended(query, key, value, attention_mask, **options)
        return module.o_proj(attended), None

    def attended(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Tensor:
        """The input [1, N, H D] of the output projection, in a pass, for queries [N, H, D], keys and values [N, K, D]."""
        module: Any = self
        query, key, value = (part[None].transpose(1, 2) for part in (query, key, value))  # transformers' layout
        attend = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]  # registered by `attention_hook`
        settings = {
            "dropout": module.attention_dropout if self.training else 0.0,
            "scaling": module.scaling,
            **_more_settings(module),
        }
        rest = {name: value for name, value in options.items() if name not in _CACHE_NAMES}
        result: Tensor = attend(self, query, key, value, attention_mask, **settings, **rest)[0]
        return result.flatten(2).contiguous()


def use_fused_attention(model: nn.Module, backend: Backend) -> None:
    """Fuse attention layers in place, where they compute the same as Llama's; they may already have adapters."""
    tried: dict[Hashable, bool] = {}

    def kind_of(module: nn.Module) -> type[nn.Module] | None:
        if not _is_built_alike(module):
            return None
        settings = tuple(_more_settings(module).items())
        known = (type(module), hasattr(module, "q_norm"), settings)
        ours = _fused(type(module))  # type: ignore[arg-type]
        if known not in tried:
            tried[known] = computes_alike(_small_layer(module), ours, _results)
        return ours if tried[known] else None

    replace_modules(model, kind_of, backend)


def _is_built_alike(module: nn.Module) -> bool:
    kind, parts = type(module), set(dict(module.named_children()))
    if not (kind.__module__.startswith("transformers.") and kind.__name__.endswith("Attention")) or hooks_of(module):
        return False
    taken = set(inspect.signature(kind.forward).parameters)
    return (
        parts in (_PROJECTIONS, _PROJECTIONS | _HEAD_NORMS)
        and taken >= {"hidden_states", "position_embeddings", "attention_mask"}
        and bool(taken & _CACHE_NAMES)
        and not isinstance(module, FusedAttention)
    )


def _more_settings(module: Any) -> dict[str, Any]:
    """A layer's options for the attention interface, besides dropout and scaling."""
    found = {option: getattr(module, name, None) for name, option in _MORE_SETTINGS.items()}
    if not hasattr(module, "sliding_window"):  # Mistral's layers look into the config
        found["sliding_window"] = getattr(module.config, "sliding_window", None)
    return found


@cache
def _fused(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that derives from ours and a layer's class, one and the same for all layers of that class."""
    # Of the same file as the layer's class, where the attention hook looks for the file's eager attention.
    return type(f"Fused{kind.__name__}", (FusedAttention, kind), {"__module__": kind.__module__, "own_class": kind})


def _empty(kind: Any) -> nn.Module:
    made = _fused(kind)
    return made.__new__(made)


class _Recorder:
    """A packing that records a layer's call of attention and returns the queries."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """Record the arguments, and return the queries unchanged."""
        self.recorded = [query, key, value, layer, settings]
        return query


def _results(layer: nn.Module, dtype: torch.dtype) -> list[Any]:
    """A layer's arguments to attention, and its output."""
    rows, angles = drawn(9, 1, 5, 16).to(dtype), drawn(8, 2, 1, 5, 8).to(dtype)
    recorder = _Recorder()
    options = {"position_embeddings": tuple(angles), "attention_mask": no_mask(rows.device), "packing": recorder}
    options |= {name: None for name in _CACHE_NAMES & set(inspect.signature(layer.forward).parameters)}
    output = layer(hidden_states=rows, **options)[0]
    return [*recorder.recorded, output]


def _small_layer(module: Any) -> nn.Module:
    """A layer of the same class and settings with 4 heads of 8 numbers, 2 key-value heads, and hidden states of 16 numbers."""
    sizes = {"q_proj": (32, 16), "k_proj": (16, 16), "v_proj": (16, 16), "o_proj": (16, 32)}
    small = small_module(type(module), sizes).eval()
    small.config = SimpleNamespace(_attn_implementation=register_packed("sdpa"))
    if hasattr(module.config, "sliding_window"):
        small.config.sliding_window = module.config.sliding_window
    small.layer_idx, small.head_dim, small.num_key_value_groups = 0, 8, 2
    for name in ("scaling", "attention_dropout", "is_causal", "_kernel_funcs", *_MORE_SETTINGS):
        if hasattr(module, name):
            setattr(small, name, getattr(module, name))
    for name in _HEAD_NORMS if hasattr(module, "q_norm") else ():
        small.add_module(name, nn.Softmax(dim=-1))  # like a norm, a function of each head's numbers
    return small


def rotary(backend: Backend, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated queries [N, H, D] and keys [N, K, D]. Falls back to transformers' function if there is no faster one.

    Cosines and sines are [N, D] and contiguous.
    """
    rotate = _rotation(backend, q, k, cos, sin)
    if rotate is None or cos.requires_grad:
        return plain_rotary(q, k, cos, sin)
    if not torch.is_grad_enabled():
        return rotate(q, cos, sin, False), rotate(k, cos, sin, False)
    return _Rotary.apply(rotate, q, cos, sin), _Rotary.apply(rotate, k, cos, sin)


# A function of x [N, heads, D], cosines and sines [N, D], and whether to rotate backwards.
Rotation = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def _rotation(backend: Backend, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Rotation | None:
    """A rotation that is faster than transformers' own; None where there is none."""
    if q.shape[-1] % 2 or not k.shape[-1] == cos.shape[-1] == q.shape[-1]:
        return None
    if backend.usable_in_layers(q, k, cos, sin):
        return kernels.rotary
    return None if backend.is_cpu(q.device) else rotated_halves


def rotated_halves(x: Tensor, cosines: Tensor, sines: Tensor, transposed: bool = False) -> Tensor:
    """Rotate [N, heads, D] on an accelerator, in three passes instead of transformers' five; backwards if `transposed`."""
    cosines, sines = (part.to(x.dtype)[:, None] for part in (cosines, sines))
    half = x.shape[-1] // 2
    first, second = sines[..., :half], sines[..., half:]
    if transposed:
        first, second = -second, -first
    result = x * cosines
    result[..., :half].addcmul_(x[..., half:], first, value=-1)
    result[..., half:].addcmul_(x[..., :half], second)
    return result


def plain_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotary` with transformers' own function."""
    query, key = modeling_llama.apply_rotary_pos_emb(q[None].transpose(1, 2), k[None].transpose(1, 2), cos[None], sin[None])
    return query[0].transpose(0, 1), key[0].transpose(0, 1)


class _Rotary(torch.autograd.Function):
    """Rotates queries or keys [N, heads, D]; it keeps only cosines and sines [N, D] for the backward pass."""

    @staticmethod
    def forward(ctx: Any, rotate: Rotation, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        ctx.rotate = rotate
        return rotate(x, cosines, sines, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None, None]:
        return None, ctx.rotate(gradient, *ctx.saved_tensors, True), None, None
