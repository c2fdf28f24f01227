"""Fused norms and gated MLPs for the base model's frozen weights.

The layers of most families compute the same as Llama's. Each class is tried once: a small layer of the class and a fused one have
to give the same bits. Fused layers keep less for the backward pass: transformers' own keep a float32 copy of a norm's input, and
the activated gate in addition to the gate. Without these copies a step of SmolLM2-135M peaked at 1.47 GiB instead of 1.56.

A fused layer replaces the original layer, with the same weights under the same names.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from hybrid_lightning.runner.attention import UnsupportedAttentionError
from hybrid_lightning.runner.backend import Backend
from hybrid_lightning.runner.compiling import OneKernel
from hybrid_lightning.runner.cpu import operators as kernels
from hybrid_lightning.runner.fused_lora import Factors, FusedLora, lora_gradients, lora_product, made_like, replace_modules


class FusedRMSNorm(LlamaRMSNorm):
    """Root mean square norm that keeps only its input and one number per token for the backward pass."""

    backend = Backend()  # not in a pass, so without operators, until `use_fused_layers` sets the model's backend

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., n] -> [..., n]."""
        if self.weight.requires_grad:
            return super().forward(hidden_states)
        if not torch.is_grad_enabled():
            return _normed(hidden_states, self.weight, self.variance_epsilon, self.backend)[0]
        return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon, self.backend)


class FusedMLP(LlamaMLP):
    """Gated MLP that keeps only the outputs of its gate and up projections, and recomputes their product for gradients."""

    backend = Backend()

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., n]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not torch.is_grad_enabled():
            return self.down_proj(self.activated(gate, up))
        down = self.down_proj
        factors = down.factors(gate) if isinstance(down, FusedLora) and not hooks_of(down) else None
        if factors is not None and factors.weight.dtype == gate.dtype == up.dtype:
            result = _GatedLora.apply(gate, up, self.backend, *factors)
        else:  # the next layer keeps their product
            result = down(_GatedSiLU.apply(gate, up, self.backend))
        return result

    def activated(self, gate: Tensor, up: Tensor) -> Tensor:
        """The input of the down projection, without a gradient: silu(gate) up, [..., m]."""
        return _product_of(gate, up, self.backend)(gate, up)


def hooks_of(module: nn.Module) -> list[Callable[..., Any]]:
    """A module's hooks on its forward and backward passes."""
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return [hook for hooks in kinds for hook in hooks.values()]


def use_fused_layers(model: nn.Module, backend: Backend) -> None:
    """Fuse the model's norms and MLPs in place, where they compute the same as Llama's.

    Layers that are already fused also get this backend.
    """
    replace_modules(model, _fused_layer, backend)


def _fused_layer(module: nn.Module) -> type[nn.Module] | None:
    kind, parts = type(module), set(dict(module.named_children()))
    if not kind.__module__.startswith("transformers.") or hooks_of(module):
        return None
    if kind.__name__.endswith("RMSNorm") and not parts and set(dict(module.named_parameters())) == {"weight"}:
        return FusedRMSNorm if hasattr(module, "variance_epsilon") and _norm_is_llamas(kind) else None  # type: ignore[arg-type]
    if kind.__name__.endswith("MLP") and parts == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return FusedMLP if type(module.act_fn) in (SiLUActivation, nn.SiLU) and _mlp_is_llamas(kind) else None  # type: ignore[arg-type]
    return None


@cache
def _norm_is_llamas(kind: type[nn.Module]) -> bool:
    small = small_module(kind)
    small.weight, small.variance_epsilon = nn.Parameter(drawn(0, 16), requires_grad=False), 1e-6
    return computes_alike(small, FusedRMSNorm, _results)


@cache
def _mlp_is_llamas(kind: type[nn.Module]) -> bool:
    small = small_module(kind, {"gate_proj": (24, 16), "up_proj": (24, 16), "down_proj": (16, 24)})
    small.act_fn = nn.SiLU()
    return computes_alike(small, FusedMLP, _results)


def _results(layer: nn.Module, dtype: torch.dtype) -> list[Any]:
    """Outputs for small and for large numbers."""
    return [layer((factor * drawn(9, 5, 16)).to(dtype)) for factor in (1, 1e3)]


def computes_alike(small: nn.Module, ours: type[nn.Module], results: Callable[[nn.Module, torch.dtype], list[Any]]) -> bool:
    """Whether a module and our class with the same parts give the same `results`, to the bit, in both precisions."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for dtype in (torch.float32, torch.bfloat16):
            mine = made_like(small.to(dtype), ours)
            try:
                pairs = zip(results(small, dtype), results(mine, dtype), strict=True)
                if not all(torch.equal(*pair) if isinstance(pair[0], Tensor) else pair[0] == pair[1] for pair in pairs):
                    return False
            except (AttributeError, TypeError, RuntimeError, ValueError, LookupError, UnsupportedAttentionError):
                return False  # a different kind of layer, or its parts are not Llama's
    return True


def small_module(kind: type[nn.Module], sizes: Mapping[str, tuple[int, int]] | None = None) -> Any:
    """A module of a class, made without its constructor, with linear layers of these sizes."""
    small = kind.__new__(kind)
    nn.Module.__init__(small)
    for seed, (name, shape) in enumerate((sizes or {}).items()):
        linear = nn.utils.skip_init(nn.Linear, 1, 1, bias=False, device="cpu")  # draws no global random numbers
        linear.weight = nn.Parameter(drawn(seed, *shape), requires_grad=False)
        small.add_module(name, linear)
    return small


def drawn(seed: int, *shape: int) -> Tensor:
    """Random numbers in float32 on the CPU, whatever torch's default device and dtype are."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu", dtype=torch.float32)


class _RMSNorm(torch.autograd.Function):
    """y = w x r with r = 1 / sqrt(mean(x^2) + eps), rounded in the same places as Llama's norm.

    The gradient is dx = r (w dy) - x r^3 mean(x w dy).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, backend: Backend) -> Tensor:
        result, inverse = _normed(x, weight, eps, backend)
        ctx.save_for_backward(x, weight, inverse)
        ctx.backend = backend
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, inverse = ctx.saved_tensors
        same = _in_dtype_of(x, weight)
        if ctx.backend.usable(gradient, x, same):
            return kernels.rms_norm_backward(gradient, x, same, inverse), None, None, None
        found = _norm_gradient(_rows(gradient), _rows(x), weight, _rows(inverse))
        return found.view_as(x), None, None, None


@partial(OneKernel, "rows _, rows _, _, rows _")
def _norm_gradient(gradient: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    of_normed = (gradient * weight).float()
    exact = x.float()
    along = torch.linalg.vecdot(of_normed, exact)[..., None] / x.shape[-1]
    result = of_normed.mul_(inverse).addcmul_(exact, along * inverse.pow(3), value=-1)
    return result.to(x.dtype)


def _normed(x: Tensor, weight: Tensor, eps: float, backend: Backend) -> tuple[Tensor, Tensor]:
    """The norm of x [..., n], and its r [..., 1] (see `_RMSNorm`)."""
    same = _in_dtype_of(x, weight)
    if backend.usable_in_layers(x, same):
        return kernels.rms_norm(x, same, eps)
    if backend.is_cpu(x.device):
        return norm.plain(x, weight, eps)
    result, inverse = norm(_rows(x), weight, eps)
    return result.view_as(x), inverse.view(*x.shape[:-1], 1)


def _rows(x: Tensor) -> Tensor:
    """[..., n] -> [N, n], so that accelerators need one kernel for any number of axes."""
    return x.reshape(-1, x.shape[-1])


@partial(OneKernel, "rows _, _")
def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`FusedRMSNorm` without an operator: w x r [..., n] for x [..., n], and r [..., 1]."""
    exact = x.float()
    inverse = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (exact * inverse).to(x.dtype), inverse


def _in_dtype_of(x: Tensor, weight: Tensor) -> Tensor:
    """The weight in the dtype of x, as operators need it, if the conversion loses nothing; else the weight unchanged."""
    if weight.dtype == x.dtype or torch.promote_types(x.dtype, weight.dtype) != x.dtype:
        return weight
    return weight.to(x.dtype)


def _product_of(gate: Tensor, up: Tensor, backend: Backend) -> Callable[[Tensor, Tensor], Tensor]:
    """The function that computes silu(gate) up for these tensors, both now and when it is recomputed."""
    if backend.usable_in_layers(gate, up):
        return kernels.gated_silu
    return _product_of_silu.plain if backend.is_cpu(gate.device) else _product_of_silu_of_rows


def _product_of_silu_of_rows(gate: Tensor, up: Tensor) -> Tensor:
    return _product_of_silu(_rows(gate), _rows(up)).view_as(gate)


@partial(OneKernel, "rows _, rows _")
def _product_of_silu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


@partial(OneKernel, "rows _, rows _, rows _")
def _silu_gradients(outer: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(outer * up, gate), F.silu(gate).mul_(outer)


def _gated_silu_gradients(outer: Tensor, gate: Tensor, up: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up [..., m], from the gradient of silu(gate) up."""
    if backend.usable(outer, gate, up):
        return kernels.gated_silu_backward(outer, gate, up)
    if backend.is_cpu(gate.device):
        return _silu_gradients.plain(outer, gate, up)
    of_gate, of_up = _silu_gradients(_rows(outer), _rows(gate), _rows(up))
    return of_gate.view_as(gate), of_up.view_as(up)


class _GatedSiLU(torch.autograd.Function):
    """silu(gate) up, [..., m]. It keeps gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, backend: Backend) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.backend = backend
        return _product_of(gate, up, backend)(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        return *_gated_silu_gradients(gradient, gate, up, ctx.backend), None


class _GatedLora(torch.autograd.Function):
    """A LoRA layer applied to silu(gate) up. It keeps gate and up instead of their product."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, backend: Backend, *given: Any) -> Tensor:
        ctx.backend, ctx.product, factors = backend, _product_of(gate, up, backend), Factors(*given)
        rows = ctx.product(gate, up).reshape(-1, gate.shape[-1])
        result, low = lora_product(rows, factors)
        ctx.save_for_backward(gate, up, factors.weight, factors.lora_a, factors.lora_b, low)
        ctx.scaling, ctx.fused = factors.scaling, factors.fused
        return result.view(*gate.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight, lora_a, lora_b, low = ctx.saved_tensors
        outer = gradient.reshape(-1, gradient.shape[-1])
        factors = Factors(weight, None, lora_a, lora_b, ctx.scaling, ctx.fused)
        of_rows, of_a, of_b = lora_gradients(outer, ctx.product(gate, up).reshape(-1, gate.shape[-1]), low, factors, True)
        assert of_rows is not None
        return *_gated_silu_gradients(of_rows.view_as(gate), gate, up, ctx.backend), None, None, None, of_a, of_b, None, None
