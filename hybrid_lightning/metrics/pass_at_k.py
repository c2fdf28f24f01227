"""pass@k: the chance that at least one of k completions is right."""

import torch
from torch import Tensor


def pass_at_k(samples: int, correct: Tensor, k: int) -> Tensor:
    """Unbiased estimate of the chance that at least one of k samples is correct (Chen et al. 2021, arXiv 2107.03374).

    1 - C(n - c, k) / C(n, k), as a product so that nothing overflows.

    Args:
        samples: n, samples drawn per prompt; at least k.
        correct: c [P], how many of them are correct.
        k: Size of the set of samples.

    Returns:
        [P] float64.

    Example:
        >>> pass_at_k(4, torch.tensor([0, 1, 4]), 2)
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k must be between 1 and the number of samples {samples}, got {k}")
    wrong = samples - correct.to(torch.float64)
    all_wrong = torch.ones_like(wrong)
    for drawn in range(k):
        all_wrong = all_wrong * ((wrong - drawn) / (samples - drawn)).clamp(min=0)
    return 1 - all_wrong
