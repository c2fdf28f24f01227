"""`Backend`: what computes the passes of one model: our operators and oneDNN on a CPU, torch elsewhere.

oneDNN's matrix products are here, too, since torch's own are slower on some CPUs. With AVX-512 torch multiplies float32 matrices
by MKL, which uses AVX2 on processors of other makers: oneDNN took 0.37 ms for [950, 128] x [128, 384] where MKL took 0.83 (AMD
EPYC, Zen 5, one thread), with sums of the same precision. On a Zen 4 both ran at the processor's peak. A weight that many
products use can be kept in the order in which oneDNN reads it: in bfloat16 that took 0.8 of the time at 32 rows and 0.6 at 8.

torch offers oneDNN's products only as an operator for its compiler. Where that operator is missing, and on other devices, the
product functions here use torch's products.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_lightning.engine.cpu import operators

_PACKED_DTYPES = (torch.float32, torch.bfloat16)
HALF = (torch.float16, torch.bfloat16)
_OLDEST = (8, 0)  # compute capability: Ampere
_SOME = 4096  # tokens of the vocabulary whose weights are float32 at a time, where products cannot give float32 otherwise
_FEWEST = 500_000  # multiplications in a product; with fewer, oneDNN's call costs more than it saves


class Backend:
    """Says whether there are operators for some tensors, and which ways to compute pay on a device.

    The fused layers of a model use operators only while a pass of the engine runs. Operators sum up in another order than torch,
    and a model that is called by itself has to compute what transformers does, bit for bit.

    Attributes:
        why_float32: Why products are computed in float32 although 16 bits were asked for, in words for the user; empty where
            they are in the dtype that was asked for.
    """

    def __init__(self) -> None:
        self._in_pass = False
        self.why_float32 = ""

    @contextmanager
    def in_pass(self, value: bool = True) -> Iterator[None]:
        """Within this context the fused layers take it that a pass of the engine runs; with False, that none runs."""
        before, self._in_pass = self._in_pass, value
        try:
            yield
        finally:
            self._in_pass = before

    def recomputed_alike(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The `context_fn` of `torch.utils.checkpoint` with which a layer is recomputed as it was computed."""
        return nullcontext(), self.in_pass(self._in_pass)

    def usable(self, *tensors: Tensor) -> bool:
        """Whether there are operators for these tensors."""
        return operators.usable(*tensors)

    def usable_in_layers(self, *tensors: Tensor) -> bool:
        """Whether a fused layer may use operators for these tensors now."""
        return self._in_pass and self.usable(*tensors)

    def why_no_operators(self, device: torch.device, dtype: torch.dtype) -> str:
        """Why there are no operators for tensors of a device and a dtype, in words for the user; empty where there are."""
        if device.type != "cpu":
            return f"they are for CPUs, and the model is on {device.type}"
        return operators.why_unusable(dtype)

    draw_tokens = staticmethod(operators.draw_tokens)  # for logits that are `usable`

    def is_cpu(self, device: torch.device) -> bool:
        """Whether a CPU computes: there matrix products beat torch's kernels of attention, at the lengths of rollouts."""
        return device.type == "cpu"

    def copies_pay(self, device: torch.device) -> bool:
        """Whether decoding gains enough by a copy of the weights, made for its products, to be worth the memory."""
        return self.is_cpu(device)

    def why_no_segments(self, device: torch.device, dtype: torch.dtype) -> str:
        """Why packed tokens do not attend by segments (see `segments.py`), in words for the user; empty where they do."""
        if device.type != "cuda":
            return f"{device.type} has no kernels of it"
        if dtype not in HALF:
            return f"its kernels have 16 bits, and the model computes with {str(dtype).partition('.')[2]}"
        return _why_not_on(device.index)

    def most_logits(self, device: torch.device) -> int:
        """Logits are computed in blocks of at most this many numbers, of which two are in memory at a time.

        On a CPU 32 MiB in float32. On an accelerator, where a block reads the whole output layer, 1 GiB: at a vocabulary of
        152,000 these are 1,766 tokens.
        """
        return 2**23 if self.is_cpu(device) else 2**28

    def key_dtype(self, key: Tensor) -> torch.dtype:
        """The dtype of cached keys: float32 where products need it, so that keys are converted once and not at every token."""
        return torch.float32 if self.is_cpu(key.device) else key.dtype

    def why_no_copies(self, device: torch.device, dtype: torch.dtype) -> str:
        """Why `prepacked_product` makes no copy of a weight, in words for the user; empty where it makes one."""
        if not self.copies_pay(device):
            return f"copies of weights do not pay on {device.type}"
        if dtype not in _PACKED_DTYPES:
            return f"float32 and bfloat16 can be prepacked, and the model computes with {str(dtype).partition('.')[2]}"
        return "" if _has_onednn() else "this processor has no AVX-512, or this torch no oneDNN"

    def prepacked_product(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        """The product with a weight [m, n] that does not change: a function of rows [N, n] that gives [N, m], without a gradient.

        It may hold a copy of the weight.
        """
        if weight.device.type == "cpu" and packs(weight.dtype):
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
            return lambda rows: _onednn(rows, packed)
        return lambda rows: F.linear(rows, weight)

    def float_logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Logits [N, V] float32 of hidden states [N, H] and a weight [V, H] of 16 bits each, without a gradient.

        Sums are float32 and are not rounded to 16 bits, which at logits of 16 to 32 would be by up to 0.06 (bfloat16).
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
        """`prepacked_product` for an output layer: logits of a weight of 16 bits are float32, see `float_logits`."""
        if weight.dtype not in HALF:
            return self.prepacked_product(weight)
        if not self.copies_pay(weight.device) or (self.usable(weight) and operators.multiplies_to_floats(weight)):
            return lambda rows: self.float_logits(rows, weight)
        product = self.prepacked_product(weight.float())  # to convert it at each token would take longer than the product

        def logits(rows: Tensor) -> Tensor:
            # Where the product is not oneDNN's, on processors without AVX-512, autocast would round it to 16 bits.
            with torch.autocast(rows.device.type, enabled=False):
                return product(rows.float())

        return logits


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on a device; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


@cache
def why_no_halves() -> str:
    """Why a CPU takes longer for products of 16 bits than for those of float32, in words for the user; empty where it does not.

    Without instructions for bfloat16 a product takes 10 to 60 times as long (AVX2, torch's own loops), or 4 to 5 times (AVX-512,
    oneDNN). What the processor and oneDNN can do decides, and no clock: a busy machine computes the same numbers as an idle one.
    `ONEDNN_MAX_CPU_ISA` counts.
    """
    supports = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)  # not there without oneDNN
    has_avx512 = "AVX512" in torch.backends.cpu.get_cpu_capability()  # by which oneDNN supports bfloat16, fast or not
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
    """Whether torch has oneDNN's operators, and the processor is one where they are faster."""
    return torch.backends.mkldnn.is_available() and "AVX512" in torch.backends.cpu.get_cpu_capability()


def _onednn(rows: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """`rows @ weight.T` [N, m] without a gradient, of [N, n] and [m, n] in any layout."""
    count = rows.shape[0] * rows.shape[1] * weight.shape[0]
    if rows.dtype == torch.float32 and rows.device.type == "cpu" and count >= _FEWEST and _has_onednn():
        return _onednn(rows, weight)
    return F.linear(rows, weight)


def packs(dtype: torch.dtype) -> bool:
    """Whether `prepacked_product` copies a weight of this dtype on this CPU, into memory that torch does not count."""
    return dtype in _PACKED_DTYPES and _has_onednn()
