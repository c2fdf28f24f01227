"""The form of a completion, whatever it says."""

from collections.abc import Sequence

from hybrid_lightning.rewards.base import RewardFunction
from hybrid_lightning.rewards.extraction import compile_pattern
from hybrid_lightning.types import Prompt


class FormatReward(RewardFunction):
    r"""1.0 if a regular expression is found in the completion, else 0.0.

    A policy finds the cheapest way to earn this, so give it a small weight beside a reward for correctness, and anchor the
    pattern: `\A<think>.+</think>\s*\S` rather than `</think>`. One pair of tags and then another:
    `\A\s*<think>(?:(?!</?think>).)+</think>\s*<answer>(?:(?!</?answer>).)+</answer>\s*\Z`.

    Args:
        pattern: Regular expression, searched anywhere in the completion; `.` also matches line breaks.
        name: What it is logged as; None for `format_reward`.

    Example:
        >>> FormatReward(r"\A<think>.+</think>")(["<think>2+2</think>4", "4"], [Prompt(text="?")] * 2)
        [1.0, 0.0]
    """

    measures_correctness = False

    def __init__(self, pattern: str, name: str | None = None) -> None:
        self.pattern = compile_pattern(pattern)
        self._name = name

    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[float]:
        """Search each completion, of B."""
        return [float(self.pattern.search(completion) is not None) for completion in completions]
