"""DAPO's soft overlong punishment (arXiv 2503.14476, equation 13): the nearer to the length limit, the more it costs.

0                                            up to max_tokens - buffer_tokens
(max_tokens - buffer_tokens - |o|) / buffer_tokens      then, down to
-1                                           from max_tokens on

The cosine length reward of "Demystifying Long Chain-of-Thought Reasoning in LLMs" (Yeo et al. 2025, arXiv 2502.03373).

    r(L) = r_max + (r_0 - r_max) (1 + cos(pi L / L_max)) / 2        for L < L_max

from r_0 at length 0 to r_max at the limit, with values of their own for right and wrong completions, and a third for those that
reach the limit. The paper takes 2 and 1 for right ones, -10 and 0 for wrong ones and -10 at the limit; the defaults here are
those of open-r1 (github.com/huggingface/open-r1), which stay within -1 and 1.

The length reward of Kimi k1.5 (arXiv 2501.12599, section 2.3.3): linear within the completions of a prompt.

    lambda = 0.5 - (L - L_min) / (L_max - L_min)

over the completions of the same prompt; a right completion earns lambda, a wrong one min(0, lambda), and nobody anything where
all are of one length. It is added to the reward for correctness.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.rewards.combined import CachedReward
from hybrid_lightning.rewards.reward_function import RewardFunction
from hybrid_lightning.rewards.text import token_counts
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
        self.reward = CachedReward(reward, type(self).__name__)
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


class GroupLength(RewardFunction):
    """Adds to a reward for correctness one for being shorter than the prompt's other completions.

    Args:
        reward: Says which completions are right, by 1.0; it counts in full.
        weight: Of the length reward, which is from -0.5 to 0.5; the paper raises it during training, and names no value.
        name: What it is logged as; None for `group_length`.

    Raises:
        ConfigError: If the weight is not positive, or `reward` does not measure correctness.
    """

    measures_correctness = False

    def __init__(self, reward: RewardFunction, weight: float = 1.0, name: str | None = None) -> None:
        if not weight > 0:
            raise ConfigError(f"GroupLength: weight={weight}: give a positive number, at most 1 where right must beat short")
        self.reward = CachedReward(reward, type(self).__name__)
        self.weight = weight
        self._name = name

    def terms(self) -> list[tuple[RewardFunction, float]]:
        """The reward for correctness and this one."""
        return [(self.reward, 1.0), (self, self.weight)]

    def check_prompt(self, prompt: Prompt) -> None:
        """As the reward for correctness does."""
        self.reward.check_prompt(prompt)

    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[float]:
        """Length reward of each completion, of B, before weighting."""
        lengths = token_counts(type(self).__name__, completions)
        right = self.reward.correct(completions, prompts)
        groups: dict[tuple[str, str, int], list[int]] = defaultdict(list)
        for position, prompt in enumerate(prompts):
            groups[prompt.set_name, prompt.source, prompt.index].append(position)
        values = [0.0] * len(completions)
        for group in groups.values():
            shortest, longest = min(lengths[position] for position in group), max(lengths[position] for position in group)
            for position in group if longest > shortest else []:
                value = 0.5 - (lengths[position] - shortest) / (longest - shortest)
                values[position] = value if right[position] else min(0.0, value)
        return values
