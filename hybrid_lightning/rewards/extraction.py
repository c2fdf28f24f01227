"""The part of a completion that counts as its answer."""

import re

from hybrid_lightning.errors import ConfigError, RewardError
from hybrid_lightning.types import Prompt


def compile_pattern(pattern: str, groups: int | None = None) -> re.Pattern[str]:
    """Compile a regular expression in which `.` also matches line breaks.

    Args:
        pattern: The regular expression.
        groups: How many groups it must have; None for any number.

    Raises:
        ConfigError: If it is none, or has another number of groups.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"pattern={pattern!r} is no regular expression: {error}; correct it") from error
    if groups is not None and compiled.groups != groups:
        raise ConfigError(
            f"pattern={pattern!r} has {compiled.groups} groups instead of {groups}: put the answer, and only that, in ( ), and "
            "write other groups as (?: )"
        )
    return compiled


def extract(pattern: re.Pattern[str] | None, completion: str) -> str | None:
    """Take the answer out of a completion.

    Args:
        pattern: With one group; the last match counts. None: the whole completion is the answer.
        completion: The text.

    Returns:
        The group of the last match, None if there is no match.
    """
    if pattern is None:
        return completion
    matches = [match.group(1) for match in pattern.finditer(completion)]
    return matches[-1] if matches else None


def reference_answer(reward: str, prompt: Prompt) -> str:
    """The answer to compare with.

    Raises:
        RewardError: If the prompt has none.
    """
    if prompt.answer is None or not prompt.answer.strip():
        raise RewardError(
            f"reward {reward} needs a reference answer, but {prompt.source or 'a prompt'} row {prompt.index} has none: set the "
            "answer_column of the data source, or take a reward that needs no answer"
        )
    return prompt.answer
