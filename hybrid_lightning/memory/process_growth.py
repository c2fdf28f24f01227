"""How much a process on a CPU grows by a model and its training: by its tensors, and by what comes with them.

Growth counts from a process that has imported everything and loaded no model. What comes with tensors was measured on Linux with
glibc, torch 2.13 for CPUs and transformers 5.24, by `benchmarks/memory` and by glibc's own statistics (`mallinfo2`):

- libraries: pages of their files that are only touched now, and Python's objects for the model;
- products: oneDNN compiles a matrix product for each new size of its matrices. It keeps the code of all of them, and the other
  data that it made only for the last ones. In float32 only LoRA's products go through oneDNN; in 16 bits all do, except those
  that our own kernels compute. Without kernels, the product with the keys of a completion gets new sizes as the completion
  grows, in steps of several tokens. Rows that end one after another, which a plan does not know of, make more sizes, but less
  of everything else;
- gaps: memory between tensors that live on, which the allocator cannot use for others. There is less with kernels, which need
  fewer tensors for intermediate results. gloo gathers weights into memory of its own before they are copied, which leaves such
  gaps too, as the weights gathered next have other sizes.

A vLLM engine (0.32, for CPUs) adds its libraries. While it packs its weights for its products it takes about as much again, and
does not give that back.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from hybrid_lightning.engine import has_operators
from hybrid_lightning.memory.engine_share import EngineShare
from hybrid_lightning.memory.settings import RunSettings
from hybrid_lightning.memory.sizes import ModelSizes
from hybrid_lightning.process import KEPT_PRODUCTS

_MIB = 2**20
START_BYTES = 440 * _MIB  # Python and libraries before a model is loaded
_LIBRARIES_BYTES = 37 * _MIB
_LAYER_BYTES = 0.8 * _MIB  # Python's objects for a decoder layer
_CODE_BYTES = 0.27 * _MIB  # of a compiled product, kept for good
_PRODUCT_BYTES = 0.26 * _MIB  # other data of a compiled product, kept for the last `KEPT_PRODUCTS`
_SIZES_PER_TOKEN = 0.6  # new sizes of products per token of a completion, in 16 bits without kernels
_VLLM_BYTES = 180 * _MIB  # pages of vLLM's libraries, and objects of its engine
_PACKING_COPIES = 1.0  # gaps by vLLM's packing of its weights, as a multiple of them
_GATHERED_COPIES = 2  # gaps by gathering, as a multiple of the weights outside of blocks, which are gathered at once


# Number of sizes of products in float32, and in 16 bits by torch and by our own kernels: without LoRA and with it.
_FLOAT32, _BY_TORCH, _BY_KERNELS = (19, 68), (53, 98), (33, 58)
_GAPS_BY_TORCH, _GAPS_BY_KERNELS = 0.13, 0.10  # as a share of the tensors that the allocator has placed


@dataclass(frozen=True)
class Growth:
    """Bytes by which a process has grown at one time."""

    tensors: float
    libraries: float
    products: float  # matrix products that oneDNN has compiled
    gaps: float  # memory that the allocator cannot use
    mapped: float  # weights that no tensor uses any more, in a file that stays mapped for other weights

    @property
    def total(self) -> float:
        """Bytes of the tensors and of all that comes with them."""
        return self.tensors + self.libraries + self.products + self.gaps + self.mapped


def process_growth(
    settings: RunSettings,
    sizes: ModelSizes,
    tensors: float,
    batches: Collection[tuple[int, int]],
    split: bool,
    share: EngineShare,
) -> Growth:
    """Growth of a process on a CPU, from the bytes of its tensors at one time, of which a rollout engine takes its `share`.

    `batches` has for each kind of batch that is sampled in the run its prompts and the completions of each. `split` says whether
    weights have been split over processes by then; otherwise they stay in the file that they are read from.
    """
    narrow = settings.mixed_precision or settings.dtype != torch.float32
    products_of_16_bits, gaps = (_BY_KERNELS, _GAPS_BY_KERNELS) if has_operators() else (_BY_TORCH, _GAPS_BY_TORCH)
    products = (products_of_16_bits if narrow else _FLOAT32)[sizes.share_full < 1]
    if narrow and not has_operators():
        products += int(_SIZES_PER_TOKEN * settings.completion_tokens * len(set(batches)))
    base = sizes.parameters * settings.dtype.itemsize
    in_file = 0 if split or settings.quantization is not None else min(base, sizes.frozen_bytes)
    freed = 0 if split or settings.quantization is not None or settings.dtype == settings.trained_dtype else base - in_file
    return Growth(
        tensors=tensors,
        libraries=_LIBRARIES_BYTES + _LAYER_BYTES * settings.layers + (_VLLM_BYTES if share.sampling else 0),
        products=_CODE_BYTES * products + _PRODUCT_BYTES * min(products, KEPT_PRODUCTS),
        gaps=gaps * (tensors - in_file - share.sampling)
        + _PACKING_COPIES * share.weights
        + (_GATHERED_COPIES * sizes.outside_bytes if split else 0),
        mapped=freed,
    )
