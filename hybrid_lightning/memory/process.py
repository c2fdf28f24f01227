"""How much larger than its tensors a process on a CPU is.

Measured by `benchmarks/memory.py` on Linux with glibc, torch 2.13 for CPUs and transformers 5.24; see results/memory_plan.md.
"""

PROCESS_BYTES = 530 * 2**20  # Python, libraries and what they load on the way
ALLOCATOR_SHARE = 0.2  # of the tensors at their peak: freed pieces that malloc keeps, and oneDNN's code and scratch memory


def process_bytes(tensors: float) -> float:
    """Resident bytes of a process at its peak.

    Args:
        tensors: Bytes of them at their peak.
    """
    return PROCESS_BYTES + (1 + ALLOCATOR_SHARE) * tensors
