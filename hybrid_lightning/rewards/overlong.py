"""DAPO's soft overlong punishment (arXiv 2503.14476, equation 13): the nearer to the length limit, the more it costs.

0                                            up to max_tokens - buffer_tokens
(max_tokens - buffer_tokens - |o|) / buffer_tokens      then, down to
-1                                           from max_tokens on
"""

from collections.abc import Sequence

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.rewards.base import RewardFunction
from hybrid_lightning.rewards.extraction import token_counts
from hybrid_lightning.types import Prompt


class OverlongPenalty(RewardFunction):
    """0 for a completion that keeps its distance from the length limit, falling to -1 at the limit.

    For a `WeightedSum`, beside a reward for correctness. The paper has 20,480 and 4,096 tokens, and weighs it as the accuracy,
    which is -1 or 1 there.

    Args:
        max_tokens: The limit, usually the sampler's `max_new_tokens`; the stop token counts.
        buffer_tokens: How far before the limit the penalty begins.
        name: What it is logged as; None for `overlong_penalty`.

    Raises:
        ConfigError: If the buffer is not within the limit.

    Example:
        >>> from hybrid_lightning.types import Completion
        >>> texts = [Completion("short", 5, True), Completion("longer", 9, True), Completion("cut off", 10, False)]
        >>> OverlongPenalty(max_tokens=10, buffer_tokens=4)(texts, [Prompt(text="?")] * 3)
        [0.0, -0.75, -1.0]
    """

    measures_correctness = False

    def __init__(self, max_tokens: int, buffer_tokens: int, name: str | None = None) -> None:
        if not 1 <= buffer_tokens <= max_tokens:
            raise ConfigError(
                f"OverlongPenalty: buffer_tokens={buffer_tokens} must be from 1 to max_tokens={max_tokens}; set max_tokens to "
                "the sampler's max_new_tokens and buffer_tokens to e.g. a fifth of it"
            )
        self.max_tokens, self.buffer_tokens = max_tokens, buffer_tokens
        self._name = name

    def check_length(self, max_new_tokens: int) -> None:
        """Raise ConfigError if no completion gets long enough to cost anything."""
        if max_new_tokens <= self.max_tokens - self.buffer_tokens:
            raise ConfigError(
                f"OverlongPenalty: completions are cut at the sampler's max_new_tokens={max_new_tokens}, but the penalty begins "
                f"after {self.max_tokens - self.buffer_tokens} tokens (max_tokens - buffer_tokens) and would never act; set "
                f"max_tokens={max_new_tokens} and buffer_tokens to e.g. a fifth of it"
            )

    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[float]:
        """Penalty of each completion, of B."""
        return [self._penalty(length) for length in token_counts(type(self).__name__, completions)]

    def _penalty(self, length: int) -> float:
        over = length - (self.max_tokens - self.buffer_tokens)
        return -min(max(over, 0), self.buffer_tokens) / self.buffer_tokens + 0.0
