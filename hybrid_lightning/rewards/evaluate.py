"""Call a reward and check what it returns, so that only one finite number per completion gets into training.

A reward is often the user's own code: an error names the term of the reward, the row of the data and the completion, on one line.
Calls may be asynchronous, and may have a time limit.
"""

import inspect
import math
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hybrid_lightning.errors import HybridLightningError, RewardError, shorten
from hybrid_lightning.rewards.reward_function import RewardFunction
from hybrid_lightning.types import Prompt, Rewards
from hybrid_lightning.user_calls import run_async
from hybrid_lightning.user_code import describe_error

if TYPE_CHECKING:
    from hybrid_lightning.rewards.arriving import ArrivingRewards


def evaluate_reward(
    reward: RewardFunction,
    completions: Sequence[str],
    prompts: Sequence[Prompt],
    counted: Sequence[bool] | None = None,
    arriving: "ArrivingRewards | None" = None,
) -> Rewards:
    """Score completions.

    Args:
        reward: The reward; each term of a `WeightedSum` gives a part of its own.
        completions: B texts.
        prompts: The B prompts, one for each completion.
        counted: False for completions that are left out (see `Rewards`): no reward sees them, and theirs are 0. None: all count.
        arriving: Has begun to score these completions one by one; None if nothing has.

    Returns:
        The rewards. `correct` is True where every part that measures correctness is at least 1.0 or, if no part does, where the
        total is.

    Raises:
        RewardError: If a term raises, or does not return one finite number per completion; the message names the term and,
            where it can be found, the row and the completion.
    """
    assert len(completions) == len(prompts), f"{len(completions)} completions for {len(prompts)} prompts"
    rows = [row for row in range(len(completions)) if counted is None or counted[row]]
    # Tuples: a reward that sorts or empties its arguments must not change what other rewards, and training, see.
    seen = (tuple(completions[row] for row in rows), tuple(prompts[row] for row in rows))
    total = torch.zeros(len(completions))
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
        parts[term.name], weights[term.name] = values, weight
        total = total + weight * values
        if term.measures_correctness:
            earned = values >= 1.0
            correct = earned if correct is None else correct & earned
    correct = total >= 1.0 if correct is None else correct
    return Rewards(total, parts, correct, weights, None if counted is None else torch.tensor(counted, dtype=torch.bool))


def extract_answers(reward: RewardFunction, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[str | None]:
    """Extract answers with the first term of the reward that measures correctness or, if none does, with its first term.

    Returns:
        For each of the B completions its answer, or None (see `RewardFunction.extract_answer`).

    Raises:
        RewardError: If the term raises, or returns neither a text nor None.
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
            message = f"{_title(term)}.extract_answer raised {describe_error(error)} {name_completion(completion, prompt)}"
            raise RewardError(message) from error
        if answer is not None and not isinstance(answer, str):
            raise RewardError(
                f"{_title(term)}.extract_answer returned {shorten(answer)} {name_completion(completion, prompt)}; it must "
                "return the answer as text, or None if there is none"
            )
        answers.append(answer)
    return answers


def term_values(reward: RewardFunction, completions: Sequence[str], prompts: Sequence[Prompt]) -> Tensor:
    """Values of one term of a reward, checked, [B] float32; see `evaluate_reward` for errors."""
    try:
        values = _called(reward, completions, prompts)
    except HybridLightningError:
        raise  # its message already says what is wrong, and where
    except (Exception, SystemExit) as error:  # sys.exit in a reward must not end training without a message
        raise _culprit(reward, completions, prompts, error) from error
    try:
        numbers = _numbers(values, len(completions))
    except ValueError as error:
        raise RewardError(f"{_title(reward)} {error}; it must return one number per completion") from error
    # Converted first: a number must be finite in float32, the dtype of the training signal.
    result = torch.tensor([_float(number) for number in numbers], dtype=torch.float32)
    wrong = result.isfinite().logical_not().nonzero()
    if len(wrong):
        row = int(wrong[0])
        number = numbers[row]
        problem = f"returned {number!r}" if isinstance(number, Real) else f"returned {shorten(number)}, which is no number,"
        raise RewardError(
            f"{_title(reward)} {problem} {name_completion(completions[row], prompts[row])}; it must return a finite number, 0.0 "
            "where it does not apply"
        )
    return result


def _called(reward: RewardFunction, completions: Sequence[str], prompts: Sequence[Prompt]) -> Any:
    """What a reward returns, awaited if its `__call__` is `async`."""
    values: Any = reward(completions, prompts)
    return run_async(values) if inspect.iscoroutine(values) else values


def _numbers(values: Any, count: int) -> list[Any]:
    """Values that a reward returned as a list of `count` entries; ValueError if they are something else."""
    if hasattr(values, "tolist"):  # tensors and arrays
        shape = tuple(values.shape)
        if shape != (count,):
            raise ValueError(f"returned shape {shape} for {count} completions")
        return list(values.tolist())
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"returned {shorten(values)} for {count} completions")
    if len(values) != count:
        raise ValueError(f"returned {len(values)} values for {count} completions")
    return [value.item() if getattr(value, "shape", None) == () else value for value in values]


def _float(number: Any) -> float:
    try:
        return float(number) if isinstance(number, Real) else math.nan
    except OverflowError:  # an integer too large for a float
        return math.inf


def _culprit(reward: RewardFunction, completions: Sequence[str], prompts: Sequence[Prompt], error: BaseException) -> RewardError:
    """Find the completion on which a reward fails by scoring them one at a time, and return the error to raise."""
    for completion, prompt in zip(completions, prompts, strict=True):
        try:
            _called(reward, [completion], [prompt])
        except (Exception, SystemExit) as single:
            return RewardError(f"{_title(reward)} raised {describe_error(single)} {name_completion(completion, prompt)}")
    first = f", the first {name_completion(completions[0], prompts[0])}; for each of them alone it did not" if completions else ""
    return RewardError(f"{_title(reward)} raised {describe_error(error)} for a batch of {len(completions)} completions{first}")


def _title(reward: RewardFunction) -> str:
    """How error messages name a reward."""
    return f"reward {type(reward).__name__} ({reward.name})"


def name_completion(completion: str, prompt: Prompt) -> str:
    """How error messages name a completion: by the row of its prompt, and its text."""
    return f"for {prompt.place} with completion {shorten(completion)}"
