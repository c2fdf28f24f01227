"""`NF4Linear`: a linear layer with a frozen weight in 4 bits; needs bitsandbytes.

It unpacks the weight and multiplies the input by it, in the dtype of autocast. On CPUs with AVX512-bf16, bitsandbytes' own layer
in eval mode rearranges its weight for a product in bfloat16, which has no gradient. But the base of a policy is in eval mode
during training. Here there is a gradient in both modes.
"""

from typing import Any

import bitsandbytes
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

from hybrid_lightning.runner import autocast_dtype


class NF4Linear(Linear4bit):
    """A linear layer with 4 bits per weight; the scale of each block of 64 weights has 8 bits (see `Quantization.layer`)."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, device: torch.device) -> None:
        # On the meta device, creating the weight takes no memory, and no random numbers for its values.
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None, quant_type="nf4", device="meta")
        packed: Any = Params4bit(weight.detach(), requires_grad=False, quant_type="nf4", module=self)
        self.weight = packed.to(device)  # this quantizes it
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., m], in the dtype of autocast, which does not know this layer."""
        dtype = autocast_dtype(x.device) or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        assert self.quant_state is not None
        result: Tensor = bitsandbytes.matmul_4bit(x.to(dtype), self.weight, quant_state=self.quant_state, bias=bias)
        return result
