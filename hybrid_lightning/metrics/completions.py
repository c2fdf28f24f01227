"""Metrics of a policy from the completions of a prompt: avg@n, pass@k, maj@k, reward, length and truncation.

Axes: P prompts, n completions per prompt.

- avg@n: the share of correct completions.
- pass@k: the probability that at least one of k completions is correct (Chen et al. 2021, arXiv 2107.03374).
- maj@k: the probability that the most frequent answer of k completions is correct (self-consistency, arXiv 2203.11171).

From n completions, pass@k and maj@k are estimated by the mean over all C(n, k) subsets of k of them. That is unbiased, since each
subset is a draw of k completions. If several answers are most frequent, they share the vote, as if one of them were drawn at
random. Completions without an answer do not vote, and a subset without any answer is wrong.

For maj@k the subsets are not enumerated. For each number v of winning votes, dynamic programming over the answers counts the
subsets of d completions in which t answers have v votes and none has more, and adds up how correct these t answers are.
"""

from collections.abc import Sequence
from math import comb

import numpy as np
import torch
from torch import Tensor

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.types import counted_groups

_MAX_SAMPLES = 1000  # up to here C(n, n/2) fits into a float64


def completion_values(
    correct: Tensor,
    answers: Sequence[Sequence[str | None]],
    reward: Tensor,
    length: Tensor,
    finished: Tensor,
    counted: Tensor | None = None,
) -> dict[str, Tensor]:
    """Metrics of each prompt from its n completions that count: name -> [P] float64, nan where too few count.

    Args:
        correct: [P, n] bool.
        answers: P times n; None for completions without one.
        reward: [P, n] float.
        length: In tokens, [P, n].
        finished: Whether a completion ended by itself, [P, n] bool; False for completions cut at the maximum length.
        counted: False for completions that are left out, [P, n] bool; None: all count.
    """
    samples = correct.shape[1]
    missing = torch.full((len(correct),), torch.nan, dtype=torch.float64, device=correct.device)
    values = {name: missing.clone() for name in completion_draws(samples)}
    for rows in counted_groups(correct, counted):
        number = rows.shape[1]  # of completions that count
        ks = [k for k in numbers_of_voters(samples) if k <= number]
        flags = correct.flatten()[rows]
        right = flags.sum(dim=1)
        texts = [[answers[row // samples][row % samples] for row in group] for group in rows.tolist()]
        votes = [maj_at_k(row, of_row, ks) for row, of_row in zip(texts, flags.tolist(), strict=True)]
        of_ks = torch.tensor(votes, dtype=torch.float64, device=correct.device)
        found = {
            f"avg@{samples}": right.double() / number,
            **{f"pass@{k}": pass_at_k(number, right, k) for k in ks},
            **{f"maj@{k}": of_ks[:, column] for column, k in enumerate(ks)},
            "reward": reward.flatten()[rows].double().mean(dim=1),
            "completion_length": length.flatten()[rows].double().mean(dim=1),
            "truncation_rate": finished.flatten()[rows].logical_not().double().mean(dim=1),
        }
        for name, value in found.items():
            values[name][rows[:, 0] // samples] = value
    return values


def completion_draws(samples: int) -> dict[str, int | None]:
    """Names of `completion_values` from n completions per prompt, as `ProblemMeans` takes them: n for shares, None for others.

    Raises:
        ConfigError: If n is above 1000.
    """
    if samples > _MAX_SAMPLES:
        raise ConfigError(f"model.eval_samples={samples}; give at most {_MAX_SAMPLES}")
    ks = numbers_of_voters(samples)
    shares = [f"avg@{samples}", *(f"pass@{k}" for k in ks), *(f"maj@{k}" for k in ks)]
    return {**dict.fromkeys(shares, samples), "reward": None, "completion_length": None, "truncation_rate": samples}


def numbers_of_voters(samples: int) -> list[int]:
    """Values of k for pass@k and maj@k from n completions: the powers of two below n, and n.

    Example:
        >>> numbers_of_voters(12)
        [1, 2, 4, 8, 12]
    """
    return [*(2**power for power in range(samples.bit_length()) if 2**power < samples), samples]


def pass_at_k(samples: int, correct: Tensor, k: int) -> Tensor:
    """Unbiased estimate of pass@k, 1 - C(n - c, k) / C(n, k), [P] float64, computed as a product so that nothing overflows.

    Args:
        samples: Number n of completions per prompt.
        correct: Number c of correct completions of each prompt, [P].
        k: Number of completions. At least one of them has to be correct.

    Example:
        >>> pass_at_k(4, torch.tensor([0, 1, 4]), 2)
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    wrong = samples - correct.to(torch.float64)
    all_wrong = torch.ones_like(wrong)
    for drawn in range(k):
        all_wrong = all_wrong * ((wrong - drawn) / (samples - drawn)).clamp(min=0)
    return 1 - all_wrong


def maj_at_k(answers: Sequence[str | None], correct: Sequence[bool], ks: Sequence[int]) -> list[float]:
    """Unbiased estimates of maj@k for one prompt, one for each k.

    Args:
        answers: Answer of each of n completions, at most 1000; None for completions without one.
        correct: Whether each completion is correct. Completions with the same answer may differ, if more than the answer is
            rewarded; the answer then counts with the share of its completions that are correct.
        ks: Numbers of voters k, each from 1 to n.

    Example:
        >>> maj_at_k(["5", "5", "6"], [True, True, False], [1, 2, 3])  # in two of the three pairs the answers differ
        [0.6666666666666666, 0.6666666666666666, 1.0]
    """
    samples = len(answers)
    votes: dict[str, list[bool]] = {}
    for answer, right in zip(answers, correct, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(bool(right))
    # For each answer: the number of its completions, and the share of them that is correct.
    camps = [(len(camp), sum(camp) / len(camp)) for camp in votes.values()]
    silent = samples - sum(size for size, _ in camps)  # completions without an answer
    won = np.zeros(samples + 1)  # size of a set -> correctness of the winners, summed over all sets of that size
    for height in range(1, max((size for size, _ in camps), default=0) + 1):
        won += _won_at(height, camps, silent, samples)
    return [float(min(won[k] / comb(samples, k), 1.0)) for k in ks]


def _won_at(height: int, camps: Sequence[tuple[int, float]], silent: int, samples: int) -> np.ndarray:
    """Correctness of the winners, summed over all sets of d completions whose winners have `height` votes; [n + 1], by d."""
    most_winners = samples // height
    sets = np.zeros((samples + 1, most_winners + 1))  # number of sets, by their size and their number of winners
    sets[0, 0] = 1.0
    right = np.zeros_like(sets)  # correctness of each winner, summed over winners and over these sets
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
