"""Completions, values and exceptions in error messages about rewards: short, and on one line.

Calls a reward and checks what it returns: nothing but one finite number per completion gets into training.
"""

import inspect
import math
import sysconfig
import traceback
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid_lightning.errors import HybridLightningError, RewardError
from hybrid_lightning.rewards.reward_function import RewardFunction
from hybrid_lightning.rewards.time_limit import run_async
from hybrid_lightning.types import Prompt, Rewards


def place(completion: str, prompt: Prompt) -> str:
    """Which completion of which row."""
    return f"for {prompt.source or 'a prompt'} row {prompt.index} with completion {shorten(completion)}"


def describe(error: BaseException) -> str:
    """An exception of somebody else's code, with the line of that code which led to it."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{_line(error)}"


def shorten(value: Any, length: int = 100) -> str:
    """The repr of a value, cut if it is long."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}... ({len(text)} characters)"


# Code that a message about somebody's reward is not interested in: ours and that of libraries.
_NOT_THEIRS = tuple({str(Path(__file__).parents[1]), *(sysconfig.get_path(name) for name in ("stdlib", "purelib"))})


def _line(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_NOT_THEIRS)]
    return f" ({Path(frames[-1].filename).name} line {frames[-1].lineno})" if frames else ""


def evaluate_reward(reward: RewardFunction, completions: Sequence[str], prompts: Sequence[Prompt]) -> Rewards:
    """Score completions.

    Args:
        reward: The reward; a `WeightedSum` has one part for each of its terms.
        completions: B texts.
        prompts: The prompt of each completion, B as well.

    Returns:
        Their rewards. `correct` says that all parts that measure correctness are at least 1.0, or, where none does, that the
        total is.

    Raises:
        RewardError: If a part raises, or does not return one finite number per completion; the message names the part and,
            where it can be found, the row and the completion.
    """
    assert len(completions) == len(prompts), f"{len(completions)} completions for {len(prompts)} prompts"
    # A reward that sorts or empties what it is given must not change what others, and training, see.
    completions, prompts = tuple(completions), tuple(prompts)
    total = torch.zeros(len(completions))
    correct = None
    parts: dict[str, Tensor] = {}
    weights: dict[str, float] = {}
    for term, weight in reward.terms():
        values = _call(term, completions, prompts)
        parts[term.name], weights[term.name] = values, weight
        total = total + weight * values
        if term.measures_correctness:
            earned = values >= 1.0
            correct = earned if correct is None else correct & earned
    return Rewards(total=total, parts=parts, correct=total >= 1.0 if correct is None else correct, weights=weights)


def extract_answers(reward: RewardFunction, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[str | None]:
    """What completions answer, by the first part of the reward that measures correctness, or else the first of all.

    Args:
        reward: The reward.
        completions: B texts.
        prompts: The prompt of each completion, B as well.

    Returns:
        B answers; None for a completion without one (see `RewardFunction.extract_answer`).

    Raises:
        RewardError: If the part raises, or returns neither a text nor None.
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
            message = f"{_title(term)}.extract_answer raised {describe(error)} {place(completion, prompt)}"
            raise RewardError(message) from error
        if answer is not None and not isinstance(answer, str):
            raise RewardError(
                f"{_title(term)}.extract_answer returned {shorten(answer)} {place(completion, prompt)}; it must return the "
                "answer as text, or None if there is none"
            )
        answers.append(answer)
    return answers


def _call(reward: RewardFunction, completions: Sequence[str], prompts: Sequence[Prompt]) -> Tensor:
    """Values of one term, [B] float32."""
    try:
        values = _awaited(reward(completions, prompts))
    except HybridLightningError:
        raise  # it says already what is wrong, and where
    except (Exception, SystemExit) as error:  # whoever calls sys.exit in a reward does not mean to end training without a word
        raise _culprit(reward, completions, prompts, error) from error
    try:
        numbers = _numbers(values, len(completions))
    except ValueError as error:
        raise RewardError(f"{_title(reward)} {error}; it must return one number per completion") from error
    # Finite also in float32, which is what the training signal is.
    result = torch.tensor([_float(number) for number in numbers], dtype=torch.float32)
    wrong = result.isfinite().logical_not().nonzero()
    if len(wrong):
        row = int(wrong[0])
        number = numbers[row]
        problem = f"returned {number!r}" if isinstance(number, Real) else f"returned {shorten(number)}, which is no number,"
        raise RewardError(
            f"{_title(reward)} {problem} {place(completions[row], prompts[row])}; it must return a finite number, 0.0 where it "
            "does not apply"
        )
    return result


def _awaited(values: Any) -> Any:
    """What a reward whose `__call__` is `async` returns in the end."""
    return run_async(values) if inspect.iscoroutine(values) else values


def _numbers(values: Any, count: int) -> list[Any]:
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
    except OverflowError:  # a whole number beyond all of float's
        return math.inf


def _culprit(reward: RewardFunction, completions: Sequence[str], prompts: Sequence[Prompt], error: BaseException) -> RewardError:
    """Find the completion that a reward fails on, by giving it one at a time."""
    for completion, prompt in zip(completions, prompts, strict=True):
        try:
            _awaited(reward([completion], [prompt]))
        except (Exception, SystemExit) as single:
            return RewardError(f"{_title(reward)} raised {describe(single)} {place(completion, prompt)}")
    return RewardError(
        f"{_title(reward)} raised {describe(error)} for a batch of {len(completions)} completions, the first "
        f"{place(completions[0], prompts[0])}; for each of them alone it did not"
        if completions
        else f"{_title(reward)} raised {describe(error)} for an empty batch"
    )


def _title(reward: RewardFunction) -> str:
    return f"reward {type(reward).__name__} ({reward.name})"
