"""`LoraLinear`: PEFT's LoRA layer with a forward and backward pass of six matrix products and nothing else.

    y = x W' + s (x A') B'                                  2 products of rank r beside the base's
    dx = dy W + (s dy B) A,   dA = (s dy B)' x,   dB = s dy' (x A')

PEFT's own makes a float32 copy of x, multiplies, scales and adds in separate passes over tensors of the layer's full size, and
keeps several of them for the backward pass. Here x is kept once, in the dtype of the product, and sums are written in place.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable


class LoraLinear(lora.Linear):
    """A `peft.tuners.lora.Linear` that computes plain LoRA on a plain linear layer faster; all else is left to PEFT."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., n] -> [..., m]."""
        adapter = self._plain_adapter() if not args and not kwargs else None
        if adapter is None:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        base, down, up = self.base_layer, self.lora_A[adapter].weight, self.lora_B[adapter].weight
        bias = None if base.bias is None else base.bias.to(dtype)
        parts = (x.to(dtype), base.weight.to(dtype), bias, down.to(dtype), up.to(dtype))
        output: Tensor = _Product.apply(*parts, self.scaling[adapter])  # type: ignore[no-untyped-call]
        return output

    def _plain_adapter(self) -> str | None:
        """The only active adapter, if what is to be computed is y = x W' + s (x A') B' and the base is frozen."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        base = self.base_layer
        if self.disable_adapters or self.merged or len(active) != 1 or type(base) is not nn.Linear or base.weight.requires_grad:
            return None
        name: str = active[0]
        dropout = self.lora_dropout[name]
        drops = self.training and isinstance(dropout, nn.Dropout) and dropout.p > 0
        return None if drops or name in self.lora_variant or self.lora_B[name].bias is not None else name


def use_fast_lora(model: PeftModel) -> None:
    """Let the model's LoRA layers on linear modules be `LoraLinear`; their weights and names stay as they are."""
    for module in model.modules():
        if type(module) is lora.Linear:
            module.__class__ = LoraLinear


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ down.T
        result = F.linear(rows, weight, bias).addmm_(low, up.T, alpha=scaling)
        ctx.save_for_backward(rows, weight, down, up, low)
        ctx.scaling = scaling  # type: ignore[attr-defined]
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, down, up, low = ctx.saved_tensors  # type: ignore[attr-defined]
        scaling = ctx.scaling  # type: ignore[attr-defined]
        outer = gradient.reshape(-1, gradient.shape[-1])
        inner = (outer @ up).mul_(scaling)
        of_input = None
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            of_input = (outer @ weight).addmm_(inner, down).view(*gradient.shape[:-1], -1)
        return of_input, None, None, inner.T @ rows, (outer.T @ low).mul_(scaling), None
