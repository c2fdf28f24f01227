"""Fused layers of the base model: norms, gated MLPs and rotary embeddings, whose weights are frozen.

The layers of most families compute what Llama's do, word for word, and are recognised by that. Norms and MLPs get a backward pass
that keeps less: transformers' own keep a float32 copy of what a norm gets, and the activated gate beside the gate. Without it, a
step of SmolLM2-135M peaked at 1.47 GiB, not at 1.56. Rotary embeddings are one operator on a CPU, where transformers' are ten:
attention layers call a function by its name in their file, and where it is Llama's a layer gets a class with the same forward
pass that finds a `rotary` under the name.
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

from hybrid_lightning.engine.cpu import operators as kernels
from hybrid_lightning.engine.fused_lora import Factors, FusedLora, lora_gradients, lora_product


class FusedRMSNorm(LlamaRMSNorm):
    """Root mean square normalisation that keeps its input and one number a token."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., n] -> [..., n]."""
        if self.weight.requires_grad:
            result: Tensor = super().forward(hidden_states)
            return result
        if not torch.is_grad_enabled():
            return _norm(hidden_states, self.weight, self.variance_epsilon)[0]
        output: Tensor = _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
        return output


class FusedMLP(LlamaMLP):
    """Gated MLP that keeps the gate and what it is multiplied by; their product is made once more in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., n]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not torch.is_grad_enabled():
            result: Tensor = self.down_proj(self.activated(gate, up))
            return result
        down = self.down_proj
        factors = down.factors(gate) if isinstance(down, FusedLora) and not is_watched(down) else None
        if factors is not None and factors.weight.dtype == gate.dtype == up.dtype:
            result = _GatedLora.apply(gate, up, *factors)  # type: ignore[no-untyped-call]
        else:  # the next layer keeps their product
            result = down(_GatedSiLU.apply(gate, up))
        return result

    def activated(self, gate: Tensor, up: Tensor) -> Tensor:
        """What the last product gets, without a gradient: silu(gate) up, [..., m]."""
        return _gated_silu(gate, up, kernels.usable_in_layers(gate, up))


def is_watched(module: nn.Module) -> bool:
    """Whether somebody waits for calls of this module, so that it has to be called."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def use_fused_layers(model: nn.Module) -> None:
    """Let the model's norms and MLPs be fused where they compute what Llama's do; their weights and names stay as they are."""
    for module in model.modules():
        if _computes_as(type(module), LlamaRMSNorm):  # type: ignore[arg-type]
            module.__class__ = FusedRMSNorm
        elif _computes_as(type(module), LlamaMLP) and type(module.act_fn) in (SiLUActivation, nn.SiLU):  # type: ignore[arg-type]
            module.__class__ = FusedMLP


@cache
def _computes_as(kind: type[nn.Module], llamas: type[nn.Module]) -> bool:
    """Whether a class of transformers has the same forward pass as one of Llama's, in the same words."""
    if not kind.__module__.startswith("transformers.") or not kind.__name__.endswith(llamas.__name__.removeprefix("Llama")):
        return False
    return words(kind.forward) == words(llamas.forward)


class _RMSNorm(torch.autograd.Function):
    """y = w x r with r = 1 / sqrt(mean(x^2) + eps), rounded where Llama's does; and

    dx = r (w dy) - x r^3 mean(x w dy).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        result, inverse = _norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return result

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        same = _in_dtype_of(x, weight)
        if kernels.usable(gradient, x, same):
            return kernels.rms_norm_backward(gradient, x, same, inverse), None, None
        of_normed = (gradient * weight).float()
        exact = x.float()
        along = torch.linalg.vecdot(of_normed, exact)[..., None] / x.shape[-1]
        result = of_normed.mul_(inverse).addcmul_(exact, along * inverse.pow(3), value=-1)
        return result.to(x.dtype), None, None


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x [..., n], and r [..., 1]."""
    same = _in_dtype_of(x, weight)
    if kernels.usable_in_layers(x, same):
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


def _gated_silu_gradients(outer: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Of gate and up."""
    if kernels.usable(outer, gate, up):
        return kernels.gated_silu_backward(outer, gate, up)
    return torch.ops.aten.silu_backward(outer * up, gate), F.silu(gate).mul_(outer)


class _GatedSiLU(torch.autograd.Function):
    """silu(gate) up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gated_silu(gate, up, kernels.usable_in_layers(gate, up))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return _gated_silu_gradients(gradient, *ctx.saved_tensors)


class _GatedLora(torch.autograd.Function):
    """LoRA of silu(gate) up."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        fused: bool,
    ) -> Tensor:
        ctx.has_kernel = kernels.usable_in_layers(gate, up)
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
        return *_gated_silu_gradients(of_rows.view_as(gate), gate, up), None, None, of_a, of_b, None, None


_NAME = "apply_rotary_pos_emb"
Rotary = Callable[..., tuple[Tensor, Tensor]]


def use_fused_rotary(model: nn.Module) -> None:
    """Let the model's attention layers rotate queries and keys by a kernel, where there is one."""
    for module in model.modules():
        fused = _fused_attention(type(module))  # type: ignore[arg-type]
        if fused is not None:
            module.__class__ = fused


@cache
def _fused_attention(kind: type[nn.Module]) -> type[nn.Module] | None:
    """A class like an attention layer's of transformers whose forward pass calls `rotary`; None for all others."""
    forward = inspect.unwrap(kind.forward)
    theirs = getattr(sys.modules[kind.__module__], _NAME, None)
    if not kind.__module__.startswith("transformers.") or theirs is None or _NAME not in forward.__code__.co_names:
        return None
    if words(theirs) != words(modeling_llama.apply_rotary_pos_emb):
        return None
    names = {**forward.__globals__, _NAME: partial(rotary, theirs)}
    same = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    same.__kwdefaults__ = forward.__kwdefaults__
    return type(kind.__name__, (kind,), {"forward": same, "__module__": kind.__module__})


def rotary(theirs: Rotary, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, heads, N, D] rotated by cos and sin [B, N, D]; by `theirs`, what has no kernel."""
    size = q.shape[-1]
    fit = unsqueeze_dim == 1 and q.dim() == 4 and size % 2 == 0 and k.shape[-1] == cos.shape[-1] == size
    if not fit or cos.requires_grad or not kernels.usable_in_layers(q, k, cos, sin):
        return theirs(q, k, cos, sin, unsqueeze_dim)
    cosines, sines = (part.expand(q.shape[0], -1, -1).flatten(0, 1).contiguous() for part in (cos, sin))
    if not torch.is_grad_enabled():
        return _rotated(q, cosines, sines, False), _rotated(k, cosines, sines, False)
    return _Rotary.apply(q, cosines, sines), _Rotary.apply(k, cosines, sines)  # type: ignore[no-untyped-call]


def rotary_of_tokens(theirs: Rotary, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The same of queries and keys [N, heads, D] by cos and sin [N, D], without a gradient.

    Args:
        theirs: A layer's function, which may be a `rotary`.
        q: [N, H, D].
        k: [N, K, D].
        cos: [N, D], contiguous.
        sin: [N, D], contiguous.
    """
    ours = isinstance(theirs, partial) and theirs.func is rotary and q.shape[-1] % 2 == 0
    if ours and kernels.usable_in_layers(q, k, cos, sin) and k.shape[-1] == cos.shape[-1] == q.shape[-1]:
        return kernels.rotary(q, cos, sin), kernels.rotary(k, cos, sin)
    query, key = theirs(q[None].transpose(1, 2), k[None].transpose(1, 2), cos[None], sin[None])
    return query[0].transpose(0, 1), key[0].transpose(0, 1)


def without_kernel(function: Rotary) -> Rotary:
    """Transformers' own function of a layer whose function may be a `rotary`."""
    theirs: Rotary = function.args[0] if isinstance(function, partial) and function.func is rotary else function
    return theirs


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


@cache
def words(function: Callable[..., Any]) -> str:
    """The source text of a function or method, without its decorators."""
    return inspect.getsource(inspect.unwrap(function)).partition("def ")[2]
