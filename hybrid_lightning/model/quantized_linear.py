"""Linear layers whose frozen weight is stored in 4 or 8 bits. They derive from layers of bitsandbytes, which must be installed.

They unpack the weight and multiply the input by it, in the dtype of autocast. bitsandbytes' own layers compute otherwise in two
things, which would be wrong for a policy:

- The 8-bit layer rounds its input to 8 bits as well, after a search for outliers in all rows together. Here the result of a row
  depends neither on the other rows nor on the layer's mode, so that log-probabilities of sampling and training agree.
- On CPUs with AVX512-bf16 the 4-bit layer in eval mode rearranges its weight for a product in bfloat16, which has no gradient;
  but the base of a policy is in eval mode while it is trained. Here there is a gradient in both modes.
"""

from typing import Any

import bitsandbytes
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class NF4Linear(Linear4bit):
    """A linear layer with 4 bits per weight; the scale of each block of 64 weights has 8 bits (see `Quantization.layer`)."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, device: torch.device) -> None:
        # On the meta device no memory is taken for a weight, and no random numbers for its values.
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None, quant_type="nf4", device="meta")
        packed: Any = Params4bit(weight.detach(), requires_grad=False, quant_type="nf4", module=self)
        self.weight = packed.to(device)  # this quantizes it
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., m]."""
        x, bias = _cast(x, self.bias)
        assert self.quant_state is not None
        result: Tensor = bitsandbytes.matmul_4bit(x, self.weight, quant_state=self.quant_state, bias=bias)
        return result


class Int8Linear(Linear8bitLt):
    """A linear layer with 8 bits per weight and one scale for each output (see `Quantization.layer`)."""

    scale: Tensor

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, device: torch.device) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None, has_fp16_weights=False, device="meta")
        packed, largest, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.detach().to(device, torch.float16))
        self.weight = Int8Params(packed, requires_grad=False, has_fp16_weights=False, SCB=largest)
        self.state.SCB = largest  # PEFT reads it here
        self.register_buffer("scale", largest / 127, persistent=False)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., m]."""
        x, bias = _cast(x, self.bias)
        result: Tensor = _UnpackedProduct.apply(x, self.weight.data, self.scale, bias)  # type: ignore[no-untyped-call]
        return result


def _cast(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Cast as autocast does for `nn.Linear`; it does not know these layers."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return x.to(dtype), None if bias is None else bias.to(dtype)


def _unpack(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return packed.to(dtype).mul_(scale[:, None])  # in place, so that the product is rounded once


class _UnpackedProduct(torch.autograd.Function):
    """`F.linear` with an 8-bit weight, which is unpacked in the forward pass and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(packed, scale)
        return F.linear(x, _unpack(packed, scale, x.dtype), bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        packed, scale = ctx.saved_tensors
        return gradient @ _unpack(packed, scale, gradient.dtype), None, None, None
