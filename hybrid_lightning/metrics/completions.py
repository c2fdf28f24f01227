"""What the completions of a prompt say of the policy: avg@n, pass@k, maj@k, reward, length and truncation.

Axes: P prompts, n completions per prompt.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.metrics.maj_at_k import maj_at_k
from hybrid_lightning.metrics.pass_at_k import pass_at_k

_MOST_SAMPLES = 1000  # C(n, n/2) is a float64 up to there


def numbers_of_voters(samples: int) -> list[int]:
    """The k of pass@k and maj@k: 1, 2, 4, ... below n, and n.

    Example:
        >>> numbers_of_voters(12)
        [1, 2, 4, 8, 12]
    """
    return [*(2**power for power in range(samples.bit_length()) if 2**power < samples), samples]


def completion_draws(samples: int) -> dict[str, int | None]:
    """The names of `completion_values`, as `ProblemMeans` wants them.

    Args:
        samples: n.

    Raises:
        ConfigError: If that is too many.
    """
    if samples > _MOST_SAMPLES:
        raise ConfigError(f"model.eval_samples must be at most {_MOST_SAMPLES}, got {samples}")
    ks = numbers_of_voters(samples)
    shares = [f"avg@{samples}", *(f"pass@{k}" for k in ks), *(f"maj@{k}" for k in ks)]
    return {**dict.fromkeys(shares, samples), "reward": None, "completion_length": None, "truncation_rate": samples}


def completion_values(
    correct: Tensor, answers: Sequence[Sequence[str | None]], reward: Tensor, length: Tensor, finished: Tensor
) -> dict[str, Tensor]:
    """Values of each prompt.

    Args:
        correct: [P, n] bool.
        answers: P times n: what each completion answers, None for nothing.
        reward: [P, n] float.
        length: [P, n] completion tokens.
        finished: [P, n] bool: False for completions cut at the maximum length.

    Returns:
        Name -> [P] float64.
    """
    samples = correct.shape[1]
    ks = numbers_of_voters(samples)
    right = correct.sum(dim=1)
    rows = zip(answers, correct.tolist(), strict=True)
    votes = torch.tensor([maj_at_k(row, flags, ks) for row, flags in rows], dtype=torch.float64, device=correct.device)
    return {
        f"avg@{samples}": right.double() / samples,
        **{f"pass@{k}": pass_at_k(samples, right, k) for k in ks},
        **{f"maj@{k}": votes[:, column] for column, k in enumerate(ks)},
        "reward": reward.double().mean(dim=1),
        "completion_length": length.double().mean(dim=1),
        "truncation_rate": finished.logical_not().double().mean(dim=1),
    }
