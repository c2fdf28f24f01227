"""How much a process on a CPU grows by a model and its training: by tensors and by what comes with them.

The level is that of a process which has imported everything and loaded no model. What comes with tensors was measured on Linux
with glibc, torch 2.13 for CPUs and transformers 5.24: by `benchmarks/memory.py`, and by glibc's own account (`mallinfo2`).

- libraries: pages of their files that are touched only now, and Python's objects for the model;
- oneDNN compiles a product anew for each size of its matrices. It keeps the code, and all else that it made for some of them, the
  last. In float32 only LoRA's go that way, in 16 bits all do, but for those that a kernel of our own computes. Without kernels,
  what multiplies by the keys of a completion does so at new sizes as it grows, by steps of several tokens. Rows that end one
  after another, which a plan does not know, make more sizes and less of all else;
- the allocator: memory between tensors that live on, in which no other finds room; less of it with kernels, which need fewer
  tensors for intermediate results;
- gloo gathers weights into memory of its own before they are copied, which is then such a gap, as the next are of other sizes.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from hybrid_lightning.engine import has_operators
from hybrid_lightning.memory.settings import RunSettings
from hybrid_lightning.memory.sizes import ModelSizes
from hybrid_lightning.process import KEPT_PRODUCTS

_MIB = 2**20
START = 440 * _MIB  # Python and libraries before a model is loaded
_LIBRARIES = 37 * _MIB
_LAYER = 0.8 * _MIB  # Python's objects for a decoder layer
_CODE, _PRODUCT = 0.27 * _MIB, 0.26 * _MIB  # of a compiled product: kept for good, and for as many as are kept
_SIZES = 0.6  # that are new without kernels, for each token of a completion
_GATHERED = 2  # times what is outside of blocks, which is gathered at once


@dataclass(frozen=True)
class _Engine:
    """What differs by whether our kernels are there."""

    float32: tuple[int, int]  # sizes of products, without LoRA and with it
    narrow: tuple[int, int]  # the same in 16 bits
    gaps: float  # of the tensors that the allocator has placed


_BY_TORCH = _Engine((19, 68), (53, 98), 0.13)
_BY_KERNELS = _Engine((19, 68), (33, 58), 0.10)


@dataclass(frozen=True)
class Growth:
    """Bytes that come with the tensors of a process in some moment."""

    tensors: float
    libraries: float
    products: float  # that oneDNN has compiled
    gaps: float
    mapped: float  # weights that no tensor holds any more, in the file that is mapped for others

    @property
    def total(self) -> float:
        """Bytes of the tensors and of what comes with them."""
        return self.tensors + self.libraries + self.products + self.gaps + self.mapped


def growth(settings: RunSettings, sizes: ModelSizes, tensors: float, batches: Collection[tuple[int, int]], split: bool) -> Growth:
    """What comes with the tensors of a moment.

    Args:
        settings: Of the run.
        sizes: Of the model.
        tensors: Bytes of tensors in the moment.
        batches: Prompts and completions of each that are sampled together.
        split: Whether weights are split over processes by then; else they stay in the file that they are read from.
    """
    narrow = settings.mixed_precision or settings.dtype != torch.float32
    engine = _BY_KERNELS if has_operators() else _BY_TORCH
    products = (engine.narrow if narrow else engine.float32)[sizes.share_full < 1]
    if narrow and not has_operators():
        products += int(_SIZES * settings.completion_tokens * len(set(batches)))
    base = sizes.parameters * settings.dtype.itemsize
    in_file = 0 if split or settings.quantization is not None else min(base, sizes.frozen_bytes)
    freed = 0 if split or settings.quantization is not None or settings.dtype == settings.trained_dtype else base - in_file
    return Growth(
        tensors=tensors,
        libraries=_LIBRARIES + _LAYER * settings.layers,
        products=_CODE * products + _PRODUCT * min(products, KEPT_PRODUCTS),
        gaps=engine.gaps * (tensors - in_file) + (_GATHERED * sizes.outside_bytes if split else 0),
        mapped=freed,
    )
