"""Calls one term of a reward and checks its result, so that training receives one finite number per completion.

A reward is often the user's own code, so an error names the reward, the row of the data and the completion, on one line.
"""

import inspect
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from hybrid_lightning.errors import HybridLightningError, RewardError, shorten
from hybrid_lightning.rewards.reward_function import RewardFunction
from hybrid_lightning.shared.user_calls import run_async
from hybrid_lightning.shared.user_code import describe_error
from hybrid_lightning.types import Prompt


def term_values(reward: RewardFunction, completions: Sequence[str], prompts: Sequence[Prompt]) -> Tensor:
    """Call one term of a reward, possibly a coroutine, and check its result.

    Returns:
        One number for each completion, [B] float32: finite, or NaN for a failed completion if `max_failed_share` allows it.

    Raises:
        RewardError: See `evaluate_reward`.
    """
    try:
        values: Any = reward(completions, prompts)
        values = run_async(values) if inspect.iscoroutine(values) else values
    except HybridLightningError:
        raise  # its message already names the mistake and the place
    except (Exception, SystemExit) as error:  # sys.exit in a reward must not end training without a message
        where = name_completion(completions[0], prompts[0]) if completions else "for no completions"
        where = where if len(completions) < 2 else f"for a batch of {len(completions)} completions, the first {where}"
        raise RewardError(f"{title(reward)} raised {describe_error(error)} {where}") from error
    try:
        numbers = _numbers(values, len(completions))
    except ValueError as error:
        raise RewardError(f"{title(reward)} {error}; it must return one number per completion") from error
    # Converted first: a number must be finite in float32, the dtype of the training signal.
    result = torch.tensor([_float(number) for number in numbers], dtype=torch.float32)
    may_fail = reward.max_failed_share is not None
    wrong = ~(result.isfinite() | (result.isnan() & may_fail))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        number = numbers[row]
        problem = f"returned {number!r}" if isinstance(number, Real) else f"returned {shorten(number)}, which is not a number,"
        raise RewardError(
            f"{title(reward)} {problem} {name_completion(completions[row], prompts[row])}; it must return a finite number, 0.0 "
            "if it does not apply"
        )
    return result


def _numbers(values: Any, count: int) -> list[Any]:
    """A reward's return value as a list of `count` entries; ValueError if it is something else."""
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


def title(reward: RewardFunction) -> str:
    """A reward's name in error messages."""
    return f"reward {type(reward).__name__} ({reward.name})"


def name_completion(completion: str, prompt: Prompt) -> str:
    """A completion's name in error messages: the row of its prompt, and its text."""
    return f"for {prompt.place} with completion {shorten(completion)}"
