"""The part of a completion that counts as its answer."""

import re
from collections.abc import Sequence

from hybrid_lightning.errors import ConfigError, RewardError
from hybrid_lightning.types import Completion, Prompt


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


def after_thinking(completion: str) -> str:
    """What a completion says after its reasoning in `<think> </think>`; reasoning that has no end is no answer.

    A prompt may have opened the reasoning already (`Completion.thinking`).

    Example:
        >>> after_thinking("<think>5? No.</think>6"), after_thinking("<think>5?"), after_thinking("6")
        ('6', '', '6')
    """
    if getattr(completion, "thinking", False) and "</think>" not in completion:
        return ""
    return completion.rpartition("</think>")[2].partition("<think>")[0]


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


def token_counts(reward: str, completions: Sequence[str]) -> list[int]:
    """Tokens of each completion, of B; the stop token counts.

    Raises:
        RewardError: If a completion is a plain string.
    """
    for completion in completions:
        if not isinstance(completion, Completion):
            raise RewardError(
                f"{reward}: completions are plain strings, whose tokens are not known: give those of a rollout, or make them "
                "Completion(text, num_tokens, finished)"
            )
    return [completion.num_tokens for completion in completions if isinstance(completion, Completion)]
