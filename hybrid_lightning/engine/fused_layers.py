"""Fused layers of the base model: norms, gated MLPs and rotary embeddings, whose weights are frozen.

The layers of most families compute what Llama's do. Whether one does is found out by trying, once for each class: a small layer
of the class and ours have to give the same bits. Norms and MLPs get a backward pass that keeps less: transformers' own keep a
float32 copy of what a norm gets, and the activated gate beside the gate. Without it, a step of SmolLM2-135M peaked at 1.47 GiB,
not at 1.56. Rotary embeddings are one operator on a CPU, where transformers' are ten: attention layers call a function by its
name in their file, and where it is Llama's a layer gets a class with the same forward pass that finds a `rotary` under the name.

A fused layer takes the place of the one that it is made from, with the same weights under the same names.
"""

import inspect
import sys
from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from hybrid_lightning.engine.backend import Backend
from hybrid_lightning.engine.cpu import operators as kernels
from hybrid_lightning.engine.fused_lora import Factors, FusedLora, lora_gradients, lora_product, made_like, replace_modules

Rotary = Callable[..., tuple[Tensor, Tensor]]
_NAME = "apply_rotary_pos_emb"  # of the function that attention layers call


class FusedRMSNorm(LlamaRMSNorm):
    """Root mean square normalisation that keeps its input and one number a token."""

    backend = Backend()  # off, until it gets that of its model

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., n] -> [..., n]."""
        if self.weight.requires_grad:
            result: Tensor = super().forward(hidden_states)
            return result
        if not torch.is_grad_enabled():
            return _norm(hidden_states, self.weight, self.variance_epsilon, self.backend)[0]
        output: Tensor = _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon, self.backend)  # type: ignore[no-untyped-call]
        return output


class FusedMLP(LlamaMLP):
    """Gated MLP that keeps the gate and what it is multiplied by; their product is made once more in the backward pass."""

    backend = Backend()

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., n]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not torch.is_grad_enabled():
            result: Tensor = self.down_proj(self.activated(gate, up))
            return result
        down = self.down_proj
        factors = down.factors(gate) if isinstance(down, FusedLora) and not is_watched(down) else None
        if factors is not None and factors.weight.dtype == gate.dtype == up.dtype:
            result = _GatedLora.apply(gate, up, self.backend, *factors)  # type: ignore[no-untyped-call]
        else:  # the next layer keeps their product
            result = down(_GatedSiLU.apply(gate, up, self.backend))
        return result

    def activated(self, gate: Tensor, up: Tensor) -> Tensor:
        """What the last product gets, without a gradient: silu(gate) up, [..., m]."""
        return _gated_silu(gate, up, self.backend.usable_in_layers(gate, up))


def is_watched(module: nn.Module) -> bool:
    """Whether somebody waits for calls of this module, so that it has to be called."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def use_fused_layers(model: nn.Module, backend: Backend) -> None:
    """Let the model's norms and MLPs be fused where they compute what Llama's do.

    Args:
        model: Changed in place.
        backend: Of the model; fused layers that it has already get it, too.
    """
    replace_modules(model, _fused_layer, backend)


def _fused_layer(module: nn.Module) -> type[nn.Module] | None:
    kind, parts = type(module), set(dict(module.named_children()))
    if not kind.__module__.startswith("transformers.") or is_watched(module):
        return None
    if kind.__name__.endswith("RMSNorm") and not parts and set(dict(module.named_parameters())) == {"weight"}:
        return FusedRMSNorm if hasattr(module, "variance_epsilon") and _norm_is_llamas(kind) else None  # type: ignore[arg-type]
    if kind.__name__.endswith("MLP") and parts == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return FusedMLP if type(module.act_fn) in (SiLUActivation, nn.SiLU) and _mlp_is_llamas(kind) else None  # type: ignore[arg-type]
    return None


@cache
def _norm_is_llamas(kind: type[nn.Module]) -> bool:
    small = kind.__new__(kind)
    nn.Module.__init__(small)
    small.weight = nn.Parameter(_drawn(0, 16), requires_grad=False)
    small.variance_epsilon = 1e-6  # type: ignore[assignment]
    return _computes_alike(small, FusedRMSNorm)


@cache
def _mlp_is_llamas(kind: type[nn.Module]) -> bool:
    small = kind.__new__(kind)
    nn.Module.__init__(small)
    for seed, (name, sizes) in enumerate({"gate_proj": (24, 16), "up_proj": (24, 16), "down_proj": (16, 24)}.items()):
        linear = nn.utils.skip_init(nn.Linear, 1, 1, bias=False, device="cpu")  # which draws no random numbers
        linear.weight = nn.Parameter(_drawn(seed, *sizes), requires_grad=False)
        small.add_module(name, linear)
    small.act_fn = nn.SiLU()
    return _computes_alike(small, FusedMLP)


def _drawn(seed: int, *shape: int) -> Tensor:
    """Numbers on the CPU, whatever torch's default device and dtype are."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu", dtype=torch.float32)


def _computes_alike(small: nn.Module, ours: type[nn.Module]) -> bool:
    """Whether a module and one of ours with its parts give the same bits, for large and small numbers of both precisions."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for dtype in (torch.float32, torch.bfloat16):
            small.to(dtype)
            for factor in (1, 1e3):
                rows = (factor * _drawn(9, 5, 16)).to(dtype)
                try:
                    theirs = small(rows)
                except (AttributeError, TypeError, RuntimeError):  # it wants something else than a norm or an MLP
                    return False
                if not (isinstance(theirs, Tensor) and torch.equal(theirs, made_like(small, ours)(rows))):
                    return False
    return True


class _RMSNorm(torch.autograd.Function):
    """y = w x r with r = 1 / sqrt(mean(x^2) + eps), rounded where Llama's does; and

    dx = r (w dy) - x r^3 mean(x w dy).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, backend: Backend) -> Tensor:
        result, inverse = _norm(x, weight, eps, backend)
        ctx.save_for_backward(x, weight, inverse)
        ctx.backend = backend
        return result

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, inverse = ctx.saved_tensors
        same = _in_dtype_of(x, weight)
        if ctx.backend.usable(gradient, x, same):
            return kernels.rms_norm_backward(gradient, x, same, inverse), None, None, None
        of_normed = (gradient * weight).float()
        exact = x.float()
        along = torch.linalg.vecdot(of_normed, exact)[..., None] / x.shape[-1]
        result = of_normed.mul_(inverse).addcmul_(exact, along * inverse.pow(3), value=-1)
        return result.to(x.dtype), None, None, None


def _norm(x: Tensor, weight: Tensor, eps: float, backend: Backend) -> tuple[Tensor, Tensor]:
    """The norm of x [..., n], and r [..., 1]."""
    same = _in_dtype_of(x, weight)
    if backend.usable_in_layers(x, same):
        return kernels.rms_norm(x, same, eps)
    return plain_norm(x, weight, eps)


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What `FusedRMSNorm` computes without a kernel: w x r [..., n] of x [..., n], and r [..., 1]."""
    exact = x.float()
    inverse = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (exact * inverse).to(x.dtype), inverse


def _in_dtype_of(x: Tensor, weight: Tensor) -> Tensor:
    """A weight as a kernel takes it; the same numbers, or as it is where the norm of x has the weight's dtype."""
    if weight.dtype == x.dtype or torch.promote_types(x.dtype, weight.dtype) != x.dtype:
        return weight
    return weight.to(x.dtype)


def _gated_silu(gate: Tensor, up: Tensor, has_kernel: bool) -> Tensor:
    if has_kernel:
        return kernels.gated_silu(gate, up)
    return F.silu(gate).mul_(up)


def _gated_silu_gradients(outer: Tensor, gate: Tensor, up: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
    """Of gate and up."""
    if backend.usable(outer, gate, up):
        return kernels.gated_silu_backward(outer, gate, up)
    return torch.ops.aten.silu_backward(outer * up, gate), F.silu(gate).mul_(outer)


class _GatedSiLU(torch.autograd.Function):
    """silu(gate) up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, backend: Backend) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.backend = backend
        return _gated_silu(gate, up, backend.usable_in_layers(gate, up))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        return *_gated_silu_gradients(gradient, gate, up, ctx.backend), None


class _GatedLora(torch.autograd.Function):
    """LoRA of silu(gate) up."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        backend: Backend,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        fused: bool,
    ) -> Tensor:
        ctx.backend, ctx.has_kernel = backend, backend.usable_in_layers(gate, up)
        rows = _gated_silu(gate, up, ctx.has_kernel).reshape(-1, gate.shape[-1])
        result, low = lora_product(rows, Factors(weight, bias, lora_a, lora_b, scaling, fused))
        ctx.save_for_backward(gate, up, weight, lora_a, lora_b, low)
        ctx.scaling, ctx.fused = scaling, fused
        return result.view(*gate.shape[:-1], -1)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight, lora_a, lora_b, low = ctx.saved_tensors
        outer = gradient.reshape(-1, gradient.shape[-1])
        factors = Factors(weight, None, lora_a, lora_b, ctx.scaling, ctx.fused)
        of_rows, of_a, of_b = lora_gradients(
            outer, _gated_silu(gate, up, ctx.has_kernel).reshape(-1, gate.shape[-1]), low, factors, True
        )
        assert of_rows is not None
        return *_gated_silu_gradients(of_rows.view_as(gate), gate, up, ctx.backend), None, None, None, of_a, of_b, None, None


def use_fused_rotary(model: nn.Module, backend: Backend) -> None:
    """Let the model's attention layers rotate queries and keys by a kernel, where there is one."""
    kinds: dict[type[nn.Module], type[nn.Module] | None] = {}  # one class for all layers

    def kind_of(module: nn.Module) -> type[nn.Module] | None:
        kind = type(module)
        if kind not in kinds:
            kinds[kind] = _fused_attention(kind, backend)
        return None if is_watched(module) else kinds[kind]

    replace_modules(model, kind_of, backend)


def _fused_attention(kind: type[nn.Module], backend: Backend) -> type[nn.Module] | None:
    """A class like an attention layer's of transformers whose forward pass calls `rotary`; None for all others."""
    forward: Any = inspect.unwrap(kind.forward)
    theirs = getattr(sys.modules[kind.__module__], _NAME, None)
    if not kind.__module__.startswith("transformers.") or theirs is None or _NAME not in forward.__code__.co_names:
        return None
    if isinstance(forward.__globals__[_NAME], partial) or not _rotates_as_llama(theirs):
        return None
    names = {**forward.__globals__, _NAME: partial(rotary, theirs, backend)}
    same: Any = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    same.__kwdefaults__ = forward.__kwdefaults__
    return type(kind.__name__, (kind,), {"forward": same, "__module__": kind.__module__})


@cache
def _rotates_as_llama(function: Rotary) -> bool:
    for dtype in (torch.float32, torch.bfloat16):
        cosines, sines = _drawn(0, 2, 2, 5, 8).to(dtype)
        parts = [_drawn(1, 2, 4, 5, 8).to(dtype), _drawn(2, 2, 2, 5, 8).to(dtype), cosines, sines]
        try:
            theirs = function(*parts)
        except (AttributeError, TypeError, RuntimeError, ValueError):
            return False
        if not all(map(torch.equal, theirs, modeling_llama.apply_rotary_pos_emb(*parts))):
            return False
    return True


def rotary(
    theirs: Rotary, backend: Backend, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, heads, N, D] rotated by cos and sin [B, N, D]; by `theirs`, what has no kernel."""
    size = q.shape[-1]
    fit = unsqueeze_dim == 1 and q.dim() == 4 and size % 2 == 0 and k.shape[-1] == cos.shape[-1] == size
    if not fit or cos.requires_grad or not backend.usable_in_layers(q, k, cos, sin):
        return theirs(q, k, cos, sin, unsqueeze_dim)
    cosines, sines = (part.expand(q.shape[0], -1, -1).flatten(0, 1).contiguous() for part in (cos, sin))
    if not torch.is_grad_enabled():
        return _rotated(q, cosines, sines, False), _rotated(k, cosines, sines, False)
    return _Rotary.apply(q, cosines, sines), _Rotary.apply(k, cosines, sines)  # type: ignore[no-untyped-call]


def rotary_of_tokens(backend: Backend, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The same of queries and keys [N, heads, D] by cos and sin [N, D], without a gradient.

    Args:
        backend: Of the model.
        q: [N, H, D].
        k: [N, K, D].
        cos: [N, D], contiguous.
        sin: [N, D], contiguous.
    """
    if q.shape[-1] % 2 == 0 and backend.usable_in_layers(q, k, cos, sin) and k.shape[-1] == cos.shape[-1] == q.shape[-1]:
        return kernels.rotary(q, cos, sin), kernels.rotary(k, cos, sin)
    return plain_rotary(q, k, cos, sin)


def plain_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """What `rotary_of_tokens` computes without a kernel."""
    query, key = modeling_llama.apply_rotary_pos_emb(q[None].transpose(1, 2), k[None].transpose(1, 2), cos[None], sin[None])
    return query[0].transpose(0, 1), key[0].transpose(0, 1)


class _Rotary(torch.autograd.Function):
    """One of both; it keeps the angles alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _rotated(x, cosines, sines, False)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return _rotated(gradient, cosines, sines, True), None, None


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor, transposed: bool) -> Tensor:
    """[B, heads, N, D]; in memory heads of a token lie together, as layers make and attention takes them."""
    tokens = x.transpose(1, 2)
    return kernels.rotary(tokens.flatten(0, 1), cosines, sines, transposed).view(tokens.shape).transpose(1, 2)
