"""Settings of the process that torch computes in on a CPU: how threads wait, what becomes of freed memory, and how many compiled
products are kept.

They are the program's to choose and not a library's, so that `python -m hybrid_lightning` makes them. Scripts that build a
Trainer themselves can: `prepare_process()` before anything imports torch.
"""

import ctypes
import os
import sys

# How often a thread looks for work before it sleeps. OpenMP's default of 300,000 times takes the time that working threads need
# where something else runs on the same cores: a step of the embedded policy beside a busy process took 20 s instead of 0.4. Few
# are slow on idle cores: SmolLM2-135M generated for 6.5 s with 1,000, for 5.7 with 4,000, for 5.5 with 20,000 and for 5.3 with
# the default; the embedded policy beside a busy process for 0.25, 0.37 and 1.0.
_SPINS = "20000"

# Products that oneDNN keeps ready, half a MiB for each size of its matrices, of which it frees half when others come. Its own
# 1,024 are more than are met again where completions end by themselves: with 128 such steps of SmolLM2-135M peaked at 1.62 GiB
# instead of 1.73 and took no longer, since making one takes a quarter of a millisecond. With 64 it was 1.59, but a step of the
# embedded policy took 4% longer.
KEPT_PRODUCTS = 128

# Of glibc's `mallopt`: numbers of its parameters, and values in bytes. Older versions take 32 MiB at most for the second.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER_TRIM, _NEVER_MAP = 2**31 - 1, (2**30, 2**25)


def prepare_process() -> None:
    """Let waiting threads look for work a little before they sleep, keep freed memory, and keep few compiled products.

    Has to run before torch is loaded, which reads the first and the last. What the environment sets itself, by `GOMP_SPINCOUNT`,
    `OMP_WAIT_POLICY`, `MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_THRESHOLD_` or `ONEDNN_PRIMITIVE_CACHE_CAPACITY`, stays as it is.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT_PRODUCTS))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    keep_freed_memory()


def keep_freed_memory() -> bool:
    """Keep what is freed for what is allocated next, where glibc would give it back to the system.

    Activations are freed and allocated again in every pass, and each of their pages would cost a fault: an update of SmolLM2-135M
    on two cores took 0.89 of the time without, at 1% more memory.

    Returns:
        Whether it does now: not without glibc, or where the environment says otherwise.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return any(mallopt(_MMAP_THRESHOLD, size) for size in _NEVER_MAP) and bool(mallopt(_TRIM_THRESHOLD, _NEVER_TRIM))
