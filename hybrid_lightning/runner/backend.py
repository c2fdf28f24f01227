"""`Backend`: chooses the operators for one model's passes: our operators and oneDNN on a CPU, torch elsewhere.

This file also calls oneDNN's matrix products, since torch's own are slower on some CPUs. With AVX-512 torch multiplies float32
matrices with MKL, which uses only AVX2 on processors of other makers: for [950, 128] x [128, 384] oneDNN took 0.37 ms and MKL
0.83 (AMD EPYC, Zen 5, one thread), with sums of the same precision. On a Zen 4 both ran at the processor's peak. A weight that
many products use can be kept in the order in which oneDNN reads it: in bfloat16 that took 0.8 of the time at 32 rows and 0.6
at 8.

torch offers oneDNN's products only as an operator for its compiler. Without that operator, and on other devices, the product
functions here use torch's products.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_lightning.runner.cpu import operators

_PACKED_DTYPES = (torch.float32, torch.bfloat16)
HALF = (torch.float16, torch.bfloat16)
_OLDEST = (8, 0)  # compute capability: Ampere
_SOME = 4096  # vocabulary tokens with float32 weights at a time, where no 16-bit product has a float32 result
_FEWEST = 500_000  # multiplications in a product; with fewer, oneDNN's call costs more than it saves


class Backend:
    """Decides which tensors have operators, and which implementations pay on a device.

    The fused layers of a model use operators only during a pass of the runner. Operators add in another order than torch, and a
    model that is called directly has to match transformers bit for bit.

    Attributes:
        why_float32: Why products are computed in float32 although 16 bits were requested, worded for the user; empty where they
            have the requested dtype.
    """

    def __init__(self) -> None:
        self._in_pass = False
        self.why_float32 = ""

    @contextmanager
    def in_pass(self, value: bool = True) -> Iterator[None]:
        """Mark a pass of the runner as running within this context, for the fused layers; False marks none as running."""
        before, self._in_pass = self._in_pass, value
        try:
            yield
        finally:
            self._in_pass = before

    def recomputed_alike(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The `context_fn` for `torch.utils.checkpoint`, so that a layer is recomputed exactly as it was computed."""
        return nullcontext(), self.in_pass(self._in_pass)

    def usable(self, *tensors: Tensor) -> bool:
        """Whether operators support these tensors."""
        return operators.usable(*tensors)

    def usable_in_layers(self, *tensors: Tensor) -> bool:
        """Whether a fused layer may use operators for these tensors at this moment."""
        return self._in_pass and self.usable(*tensors)

    def why_no_operators(self, device: torch.device, dtype: torch.dtype) -> str:
        """Why no operators support this device and dtype, worded for the user; empty where they do."""
        if device.type != "cpu":
            return f"they are for CPUs, and the model is on {device.type}"
        return operators.why_unusable(dtype)

    draw_tokens = staticmethod(operators.draw_tokens)  # for logits that are `usable`

    def is_cpu(self, device: torch.device) -> bool:
        """Whether a CPU computes: there matrix products beat torch's attention kernels at the lengths of rollouts."""
        return device.type == "cpu"

    def copies_pay(self, device: torch.device) -> bool:
        """Whether a copy of the weights in the products' order makes decoding fast enough to be worth its memory."""
        return self.is_cpu(device)

    def why_no_segments(self, device: torch.device, dtype: torch.dtype) -> str:
        """Why packed tokens do not attend by segments (see `segments.py`), worded for the user; empty where they do."""
        if device.type != "cuda":
            return f"{device.type} has no kernels for it"
        if dtype not in HALF:
            return f"its kernels take 16 bits, and the model computes with {str(dtype).partition('.')[2]}"
        return _why_not_on(device.index)

    def most_logits(self, device: torch.device) -> int:
        """Largest size of a block of logits, in numbers. Two blocks are in memory at a time.

        32 MiB of float32 on a CPU. 1 GiB on an accelerator, since each block reads the whole output layer: 1,766 tokens with a
        vocabulary of 152,000.
        """
        return 2**23 if self.is_cpu(device) else 2**28

    def key_dtype(self, key: Tensor) -> torch.dtype:
        """The dtype of cached keys: float32 where products need it, so that keys are converted once, not at every token."""
        return torch.float32 if self.is_cpu(key.device) else key.dtype

    def why_no_copies(self, device: torch.device, dtype: torch.dtype) -> str:
        """Why `prepacked_product` makes no copy of a weight, worded for the user; empty where it makes one."""
        if not self.copies_pay(device):
            return f"copies of weights do not pay on {device.type}"
        if dtype not in _PACKED_DTYPES:
            return f"float32 and bfloat16 can be prepacked, and the model computes with {str(dtype).partition('.')[2]}"
        return "" if _has_onednn() else "the processor has no AVX-512, or torch has no oneDNN"

    def prepacked_product(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        """Product with a constant weight [m, n]: a function from rows [N, n] to [N, m], without a gradient.

        The function may hold a copy of the weight.
        """
        if weight.device.type == "cpu" and packs(weight.dtype):
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
            return lambda rows: _onednn(rows, packed)
        return lambda rows: F.linear(rows, weight)

    def float_logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Logits [N, V] float32 of 16-bit hidden states [N, H] and a 16-bit weight [V, H], without a gradient.

        Sums are float32 and never rounded to 16 bits. Rounding would change logits of 16 to 32 by up to 0.06 (bfloat16).
        """
        if self.usable(hidden, weight) and operators.multiplies_to_floats(weight):
            return operators.float_logits(hidden, weight)
        if hidden.device.type == "cuda" and torch.version.hip is None:
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            logits, rows = hidden.new_empty(len(hidden), len(weight), dtype=torch.float32), hidden.float()
            for part, result in zip(weight.split(_SOME), logits.split(_SOME, dim=1), strict=True):
                result.copy_(rows @ part.float().T)
        return logits

    def projection(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        """`prepacked_product` for an output layer: a 16-bit weight gives float32 logits, see `float_logits`."""
        if weight.dtype not in HALF:
            return self.prepacked_product(weight)
        if not self.copies_pay(weight.device) or (self.usable(weight) and operators.multiplies_to_floats(weight)):
            return lambda rows: self.float_logits(rows, weight)
        product = self.prepacked_product(weight.float())  # converting at each token would take longer than the product

        def logits(rows: Tensor) -> Tensor:
            # Without AVX-512 this is torch's product, which autocast would round to 16 bits.
            with torch.autocast(rows.device.type, enabled=False):
                return product(rows.float())

        return logits


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on a device; None if autocast is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


@cache
def why_no_halves() -> str:
    """Why 16-bit products are slower than float32 products on this CPU, worded for the user; empty where they are not.

    Without instructions for bfloat16 a product takes 10 to 60 times as long (AVX2, torch's own loops), or 4 to 5 times (AVX-512,
    oneDNN). The abilities of the processor and oneDNN decide, never a timing: a busy machine computes the same numbers as an
    idle one. `ONEDNN_MAX_CPU_ISA` is respected.
    """
    supports = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)  # missing without oneDNN
    has_avx512 = "AVX512" in torch.backends.cpu.get_cpu_capability()  # with it oneDNN supports bfloat16, fast or not
    fast = supports() and (not has_avx512 or getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)())
    return "" if fast else "this processor has no instructions for bfloat16"


@cache
def _why_not_on(index: int | None) -> str:
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without FlashAttention"
    capability = torch.cuda.get_device_capability(index)
    return "" if capability >= _OLDEST else f"it needs compute capability 8.0, and this GPU has {'.'.join(map(str, capability))}"


@cache
def _has_onednn() -> bool:
    """Whether torch has oneDNN's operators, and they are faster on this processor."""
    return torch.backends.mkldnn.is_available() and "AVX512" in torch.backends.cpu.get_cpu_capability()


def _onednn(rows: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """`rows @ weight.T` [N, m] without a gradient, for [N, n] and [m, n] in any layout."""
    count = rows.shape[0] * rows.shape[1] * weight.shape[0]
    if rows.dtype == torch.float32 and rows.device.type == "cpu" and count >= _FEWEST and _has_onednn():
        return _onednn(rows, weight)
    return F.linear(rows, weight)


def packs(dtype: torch.dtype) -> bool:
    """Whether `prepacked_product` copies a weight of this dtype on this CPU, into memory outside torch's accounting."""
    return dtype in _PACKED_DTYPES and _has_onednn()
