"""Accuracy of sampled completions: avg@k and pass@k as a torchmetrics metric.

Axes: P prompts, G samples per prompt.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


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


class CompletionMetrics(Metric):
    """avg@k, pass@k, mean reward and mean length over prompts.

    Holds one row per prompt and counts each prompt once, by its index: the distributed sampler of Lightning repeats prompts
    to give every rank the same number, and repeated ones must not weigh double.

    Args:
        samples: n, completions per prompt.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    index: list[Tensor]
    rows: list[Tensor]

    def __init__(self, samples: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.samples = samples
        self.add_state("index", default=[], dist_reduce_fx="cat")
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, index: Tensor, correct: Tensor, reward: Tensor, length: Tensor) -> None:
        """Add prompts.

        Args:
            index: [P] int64, what identifies each prompt.
            correct: [P, n] bool.
            reward: [P, n] float.
            length: [P, n] completion tokens.
        """
        columns = (correct.double().sum(1), reward.double().mean(1), length.double().mean(1))
        self.index.append(index.long())
        self.rows.append(torch.stack(columns, dim=1))

    def compute(self) -> dict[str, Tensor]:
        """`avg@n`, `pass@k` for k = 2, 4, ... up to n, `reward` and `length`; each float32."""
        if len(self.index) == 0:  # no batch was seen; a list, or a tensor once ranks have been gathered
            return {}
        index, rows = dim_zero_cat(self.index), dim_zero_cat(self.rows)
        _, inverse = index.unique(return_inverse=True)
        first = torch.full((int(inverse.max()) + 1,), len(index), device=index.device)
        first = first.scatter_reduce(0, inverse, torch.arange(len(index), device=index.device), "amin")
        correct, reward, length = rows[first].unbind(dim=1)
        result = {f"avg@{self.samples}": correct.mean() / self.samples}
        k = 2
        while k < self.samples:
            result[f"pass@{k}"] = pass_at_k(self.samples, correct, k).mean()
            k *= 2
        if self.samples > 1:
            result[f"pass@{self.samples}"] = pass_at_k(self.samples, correct, self.samples).mean()
        result |= {"reward": reward.mean(), "length": length.mean()}
        return {name: value.float() for name, value in result.items()}
