"""maj@k: the chance that the most frequent answer of k completions is right (self-consistency, arXiv 2203.11171).

From n completions the estimate is the mean over all C(n, k) sets of k of them, which is unbiased since each set is a draw of k.
In a set the most frequent answers share the vote: two that tie for the first place count half each, as if one were drawn.
Completions without an answer have no vote, and a set in which none has one is wrong.

The sum over sets is not made one by one. For each height v of the winning vote, the number of ways to choose d completions of
which t answers have v votes and none more grows answer by answer, and with it the sum of how right those t answers are.
"""

from collections.abc import Sequence
from math import comb

import numpy as np


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
