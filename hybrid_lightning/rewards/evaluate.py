"""Scores completions with all terms of a reward, and extracts the answers that majority votes count."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hybrid_lightning.errors import HybridLightningError, JudgeError, RewardError
from hybrid_lightning.rewards.arriving import ArrivingRewards
from hybrid_lightning.rewards.reward_function import RewardFunction
from hybrid_lightning.rewards.terms import name_completion, term_values, title
from hybrid_lightning.shared.user_code import describe_error
from hybrid_lightning.types import Prompt, Rewards


def evaluate_reward(
    reward: RewardFunction,
    completions: Sequence[str],
    prompts: Sequence[Prompt],
    counted: Sequence[bool] | None = None,
    arriving: ArrivingRewards | None = None,
) -> Rewards:
    """Score completions.

    Args:
        reward: The reward; each term of a `WeightedSum` gives a separate part.
        completions: B texts.
        prompts: The B prompts, one for each completion.
        counted: False for completions that are left out (see `Rewards`): no reward scores them, and their values are 0. None: all
            count.
        arriving: The scorer that has started on these completions one by one; None if there is none.

    Returns:
        The rewards. `correct` is True if every part that measures correctness is at least 1.0; without such a part
        (`measures_correctness` is then False), if the total is at least 1.0. A completion that some term could not score (see
        `RewardFunction.max_failed_share`) does not count.

    Raises:
        RewardError: If a term raises, does not return one finite number per completion, or has no value for too many completions.
            The message names the term, the row and the completion (the first ones, for a term that scores a whole batch).
    """
    assert len(completions) == len(prompts), f"{len(completions)} completions for {len(prompts)} prompts"
    rows = [row for row in range(len(completions)) if counted is None or counted[row]]
    # Tuples: a reward that sorts or empties its arguments must not affect other rewards or training.
    seen = (tuple(completions[row] for row in rows), tuple(prompts[row] for row in rows))
    total = torch.zeros(len(completions))
    failed = torch.zeros(len(completions), dtype=torch.bool)
    may_fail = [term for term, _ in reward.terms() if term.max_failed_share is not None]
    correct = None
    parts: dict[str, Tensor] = {}
    weights: dict[str, float] = {}
    for term, weight in reward.terms():
        values = torch.zeros(len(completions))
        known = {} if arriving is None else arriving.values(term, rows, completions)
        for row, value in known.items():
            values[row] = value
        others = [row for row in rows if row not in known]
        if known and others:
            values[others] = term_values(term, [completions[row] for row in others], [prompts[row] for row in others])
        elif not known:
            values[rows] = term_values(term, *seen)
        if term in may_fail:
            failed |= _failed(term, values, len(rows))
            values = values.nan_to_num(0.0)
        parts[term.name], weights[term.name] = values, weight
        total = total + weight * values
        if term.measures_correctness:
            earned = values >= 1.0
            correct = earned if correct is None else correct & earned
    measured = correct is not None
    correct = total >= 1.0 if correct is None else correct
    if may_fail:
        counted = [True] * len(completions) if counted is None else counted
    kept = None if counted is None else torch.tensor(counted, dtype=torch.bool) & ~failed
    return Rewards(total, parts, correct, weights, kept, measured)


def _failed(term: RewardFunction, values: Tensor, count: int) -> Tensor:
    """Which completions a term could not score, [B] bool; JudgeError if there are too many among the `count` that it got."""
    missing = values.isnan()
    assert term.max_failed_share is not None
    if int(missing.sum()) > term.max_failed_share * count:
        raise JudgeError(
            f"{title(term)} failed on {int(missing.sum())} of {count} completions, more than max_failed_share="
            f"{term.max_failed_share:g}; the last failure: {term.failure}"
        )
    return missing


def extract_answers(reward: RewardFunction, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[str | None]:
    """Extract answers with the first term of the reward that measures correctness or, if none does, with its first term.

    Returns:
        For each of the B completions, its answer or None (see `RewardFunction.extract_answer`).

    Raises:
        RewardError: If the term raises.
    """
    terms = [term for term, _ in reward.terms()]
    term = next((term for term in terms if term.measures_correctness), terms[0])
    answers = []
    for completion, prompt in zip(completions, prompts, strict=True):
        try:
            answer = term.extract_answer(completion, prompt)
        except HybridLightningError:
            raise
        except Exception as error:
            message = f"{title(term)}.extract_answer raised {describe_error(error)} {name_completion(completion, prompt)}"
            raise RewardError(message) from error
        answers.append(answer)
    return answers
