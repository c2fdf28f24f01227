"""Process settings for torch: on a CPU, how threads wait, whether freed memory is kept, and how many compiled products are
kept; on a GPU, how memory is allocated, and which kernels compute attention.

The CPU settings are a program's choice, not a library's, so `python -m hybrid_lightning` makes them. A script that builds its own
Trainer can call `prepare_process()` before anything imports torch. A policy makes the GPU settings when its run begins.
"""

import ctypes
import os
import sys

# How often a thread looks for work before it sleeps. With OpenMP's default of 300,000, waiting threads take time from working
# threads if something else runs on the same cores: beside a busy process, a step of the embedded policy took 20 s, not 0.4 s.
# Small numbers are slow on idle cores: SmolLM2-135M generated for 6.5 s with 1,000, for 5.7 s with 4,000, for 5.5 s with 20,000
# and for 5.3 s with the default. Beside a busy process, the embedded policy generated for 0.25, 0.37 and 1.0 s with the first
# three.
_SPINS = "20000"

# Number of compiled matrix products that oneDNN keeps, one per matrix size, half a MiB each; above it, oneDNN frees half of them.
# Its default of 1,024 is too many if completions have different lengths, since most are not used again. With 128, such steps of
# SmolLM2-135M peaked at 1.62 GiB instead of 1.73 and took no longer, since compiling a product takes a quarter of a millisecond.
# With 64 the peak was 1.59 GiB, but a step of the embedded policy took 4% longer.
KEPT_PRODUCTS = 128

# Parameters of glibc's `mallopt` by number, and values in bytes. Older versions accept at most 32 MiB for the second one.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER_TRIM, _NEVER_MAP = 2**31 - 1, (2**30, 2**25)


def prepare_process() -> None:
    """Let waiting threads sleep after a short time, keep freed memory, and keep fewer compiled products.

    Call it before torch is loaded, since torch reads the first and the last setting. These environment variables take precedence:
    `GOMP_SPINCOUNT`, `OMP_WAIT_POLICY`, `MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_THRESHOLD_` and `ONEDNN_PRIMITIVE_CACHE_CAPACITY`.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT_PRODUCTS))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    keep_freed_memory()

    import warnings  # only now: earlier allocations would fragment the kept memory

    warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's advice in each notebook that imports it


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next allocation, instead of returning it to the system.

    Every pass frees and allocates activations again, and each of their pages would cost a page fault. With kept memory an update
    of SmolLM2-135M on two cores took 0.89 of the time, with 1% more memory.

    Returns:
        Whether freed memory is kept now; False without glibc, or if the environment decides differently.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return any(mallopt(_MMAP_THRESHOLD, size) for size in _NEVER_MAP) and bool(mallopt(_TRIM_THRESHOLD, _NEVER_TRIM))


def prepare_gpu(own_allocator: bool) -> None:
    """Allocate GPU memory in growing segments, do not use cuDNN for attention, and add up 16-bit products in float32.

    - Passes have different sizes at every step. Segments of fixed size would fragment and leave free memory unusable.
    - cuDNN makes a plan for each new size of attention, which takes 23 to 37 ms.
    - By default, torch lets cuBLAS round partial sums of 16-bit products to 16 bits, in splits that depend on the number of rows.
      Sampling and training would then round in different places.

    Products in float32 do not use TF32, which is torch's default.

    Args:
        own_allocator: Whether something else in this process has its own GPU allocator, as vLLM does in order to sleep. Growing
            segments do not work with it.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    chosen = any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    allocate = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    allocate = allocate or getattr(torch.cuda.memory, "_set_allocator_settings", None)  # name in older versions
    if allocate is not None and not chosen and not own_allocator:
        allocate("expandable_segments:True")
