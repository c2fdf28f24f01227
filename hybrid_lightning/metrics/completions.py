"""pass@k: the chance that at least one of k completions is right.

maj@k: the chance that the most frequent answer of k completions is right (self-consistency, arXiv 2203.11171).

From n completions the estimate is the mean over all C(n, k) sets of k of them, which is unbiased since each set is a draw of k.
In a set the most frequent answers share the vote: two that tie for the first place count half each, as if one were drawn.
Completions without an answer have no vote, and a set in which none has one is wrong.

The sum over sets is not made one by one. For each height v of the winning vote, the number of ways to choose d completions of
which t answers have v votes and none more grows answer by answer, and with it the sum of how right those t answers are.

What the completions of a prompt say of the policy: avg@n, pass@k, maj@k, reward, length and truncation.

Axes: P prompts, n completions per prompt.
"""

from collections.abc import Sequence
from math import comb

import numpy as np
import torch
from torch import Tensor

from hybrid_lightning.errors import ConfigError


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


def maj_at_k(answers: Sequence[str | None], correct: Sequence[bool], ks: Sequence[int]) -> list[float]:
    """Unbiased estimates of maj@k for one prompt.

    Args:
        answers: Of each of n completions, at most 1000; None for those without one.
        correct: Whether each is right. Completions with one answer may differ, where more than the answer is rewarded; the answer
            is then right to the share that is.
        ks: Numbers of voters, each from 1 to n.

    Returns:
        One number from 0 to 1 for each k.

    Example:
        >>> maj_at_k(["5", "5", "6"], [True, True, False], [1, 2, 3])  # of three pairs, two tie
        [0.6666666666666666, 0.6666666666666666, 1.0]
    """
    samples = len(answers)
    if not all(1 <= k <= samples for k in ks):
        raise ValueError(f"each k must be between 1 and the number of samples {samples}, got {list(ks)}")
    votes: dict[str, list[bool]] = {}
    for answer, right in zip(answers, correct, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(bool(right))
    camps = [(len(camp), sum(camp) / len(camp)) for camp in votes.values()]
    silent = samples - sum(size for size, _ in camps)
    won = np.zeros(samples + 1)  # by the number of completions chosen: how right the winners are, summed over sets
    for height in range(1, max((size for size, _ in camps), default=0) + 1):
        won += _won_at(height, camps, silent, samples)
    return [float(min(won[k] / comb(samples, k), 1.0)) for k in ks]


def _won_at(height: int, camps: Sequence[tuple[int, float]], silent: int, samples: int) -> np.ndarray:
    """[n + 1]: over all sets of d completions whose winners have `height` votes, the sum of how right the winners are."""
    most_winners = samples // height
    sets = np.zeros((samples + 1, most_winners + 1))  # number of sets, by completions chosen and by winners
    sets[0, 0] = 1.0
    right = np.zeros_like(sets)  # over those sets, the sum over winners of how right each is
    for size, share in camps:
        new_sets, new_right = np.zeros_like(sets), np.zeros_like(sets)
        for votes in range(min(size, height - 1) + 1):
            ways, end = comb(size, votes), samples + 1 - votes
            new_sets[votes:] += ways * sets[:end]
            new_right[votes:] += ways * right[:end]
        if size >= height:
            ways, end = comb(size, height), samples + 1 - height
            new_sets[height:, 1:] += ways * sets[:end, :-1]
            new_right[height:, 1:] += ways * (right + share * sets)[:end, :-1]
        sets, right = new_sets, new_right
    each = (right[:, 1:] / np.arange(1, most_winners + 1)).sum(axis=1)
    total = np.zeros(samples + 1)
    for chosen in range(silent + 1):
        total[chosen:] += comb(silent, chosen) * each[: samples + 1 - chosen]
    return total


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
