"""The cosine length reward of "Demystifying Long Chain-of-Thought Reasoning in LLMs" (Yeo et al. 2025, arXiv 2502.03373).

    r(L) = r_max + (r_0 - r_max) (1 + cos(pi L / L_max)) / 2        for L < L_max

from r_0 at length 0 to r_max at the limit, with values of their own for right and wrong completions, and a third for those that
reach the limit. The paper takes 2 and 1 for right ones, -10 and 0 for wrong ones and -10 at the limit; the defaults here are
those of open-r1 (github.com/huggingface/open-r1), which stay within -1 and 1.
"""

import math
from collections.abc import Sequence

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.rewards.base import RewardFunction
from hybrid_lightning.rewards.extraction import token_counts
from hybrid_lightning.rewards.remembered import Remembered
from hybrid_lightning.types import Prompt


class CosineLength(RewardFunction):
    """Replaces a reward for correctness by one that depends on length too.

    With the defaults a short right completion earns most, a short wrong one least. The reward for correctness is logged beside
    it, with weight 0.

    Args:
        reward: Says which completions are right, by 1.0.
        max_tokens: The limit, usually the sampler's `max_new_tokens`; the stop token counts.
        right_shortest: Reward of a right completion of length 0.
        right_longest: Reward of a right completion at the limit.
        wrong_shortest: Reward of a wrong completion of length 0.
        wrong_longest: Reward of a wrong completion at the limit.
        at_limit: Reward of every completion that reaches the limit; None for what the formula gives.
        name: What it is logged as; None for `cosine_length`.

    Raises:
        ConfigError: If the limit is below 1, or `reward` does not measure correctness.
    """

    measures_correctness = False

    def __init__(
        self,
        reward: RewardFunction,
        max_tokens: int,
        right_shortest: float = 1.0,
        right_longest: float = 0.5,
        wrong_shortest: float = -1.0,
        wrong_longest: float = -0.5,
        at_limit: float | None = None,
        name: str | None = None,
    ) -> None:
        if max_tokens < 1:
            raise ConfigError(f"CosineLength: max_tokens={max_tokens}: give at least 1, usually the sampler's max_new_tokens")
        self.reward = Remembered(reward, type(self).__name__)
        self.max_tokens = max_tokens
        self.right, self.wrong = (right_shortest, right_longest), (wrong_shortest, wrong_longest)
        self.at_limit = at_limit
        self._name = name

    def terms(self) -> list[tuple[RewardFunction, float]]:
        """The reward for correctness, which does not count, and this one."""
        return [(self.reward, 0.0), (self, 1.0)]

    def check_prompt(self, prompt: Prompt) -> None:
        """As the reward for correctness does."""
        self.reward.check_prompt(prompt)

    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[float]:
        """Reward of each completion, of B."""
        lengths = token_counts(type(self).__name__, completions)
        return [
            self._value(length, right) for length, right in zip(lengths, self.reward.correct(completions, prompts), strict=True)
        ]

    def _value(self, length: int, right: bool) -> float:
        if length >= self.max_tokens and self.at_limit is not None:
            return self.at_limit
        shortest, longest = self.right if right else self.wrong
        return longest + (shortest - longest) * (1 + math.cos(math.pi * min(length / self.max_tokens, 1.0))) / 2
