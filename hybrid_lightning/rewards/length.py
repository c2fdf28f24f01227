"""Rewards that depend on the length of a completion in tokens, L (|o| in DAPO); the stop token counts.

`OverlongPenalty`: DAPO's soft overlong punishment (arXiv 2503.14476, equation 13), which grows near the length limit:

    0                                                   up to L = max_tokens - buffer_tokens
    (max_tokens - buffer_tokens - L) / buffer_tokens    from there on, down to
    -1                                                  from L = max_tokens on

`CosineLength`: the cosine length reward of "Demystifying Long Chain-of-Thought Reasoning in LLMs" (Yeo et al. 2025, arXiv
2502.03373):

    r(L) = r_max + (r_0 - r_max) (1 + cos(pi L / L_max)) / 2        for L < L_max

It goes from r_0 at length 0 to r_max at the limit L_max. Right and wrong completions have separate values of r_0 and r_max, and a
completion that reaches the limit has a third value. The paper takes r_0 = 2 and r_max = 1 for right ones, -10 and 0 for wrong
ones, and -10 at the limit. The defaults here come from open-r1 (github.com/huggingface/open-r1), between -1 and 1.

`GroupLength`: the length reward of Kimi k1.5 (arXiv 2501.12599, section 2.3.3), linear in the length and added to the reward for
correctness:

    lambda = 0.5 - (L - L_min) / (L_max - L_min)

L_min and L_max are the lengths of the shortest and the longest completion of the same prompt. A right completion earns lambda, a
wrong one min(0, lambda), and every completion 0 if all have the same length.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor

from hybrid_lightning.errors import ConfigError, RewardError
from hybrid_lightning.rewards.reward_function import DelegatingReward, RewardFunction
from hybrid_lightning.types import Completion, Prompt


class OverlongPenalty(RewardFunction):
    """0 for a completion well below the length limit, falling to -1 at the limit.

    Use it in a `WeightedSum` with a reward for correctness. The paper uses max_tokens=20480 and buffer_tokens=4096, and gives
    the penalty the same weight as its accuracy reward, which is -1 or 1.

    Args:
        max_tokens: The limit, usually the sampler's `max_new_tokens`; the stop token counts.
        buffer_tokens: Number of tokens before the limit at which the penalty begins.
        name: Name in logs; None for `overlong_penalty`.

    Raises:
        ConfigError: If `buffer_tokens` is below 1 or above `max_tokens`.

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
        """Raise ConfigError if the sampler's completions never get long enough for a penalty."""
        if max_new_tokens <= self.max_tokens - self.buffer_tokens:
            raise ConfigError(
                f"OverlongPenalty: completions are cut at the sampler's max_new_tokens={max_new_tokens}, but the penalty begins "
                f"after {self.max_tokens - self.buffer_tokens} tokens (max_tokens - buffer_tokens) and would have no effect; set "
                f"max_tokens={max_new_tokens} and buffer_tokens to e.g. a fifth of it"
            )

    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[float]:
        """The penalty of each of B completions."""
        return [self._penalty(length) for length in token_counts(type(self).__name__, completions)]

    def _penalty(self, length: int) -> float:
        over = length - (self.max_tokens - self.buffer_tokens)
        return -min(max(over, 0), self.buffer_tokens) / self.buffer_tokens + 0.0


class _CachedReward(DelegatingReward):
    """Keeps the values of a reward for the last batch.

    `CosineLength` and `GroupLength` depend on a reward for correctness, which is also logged as a separate term: the second
    call gets the kept values.

    Args:
        reward: The reward, which must measure correctness and must not be a sum.
        user: Name of the class that wraps it, for error messages.
    """

    def __init__(self, reward: RewardFunction, user: str) -> None:
        if reward.terms() != [(reward, 1.0)] or not reward.measures_correctness:
            raise ConfigError(
                f"{user}: reward={type(reward).__name__} must be one reward that measures correctness, such as MathMatch; put "
                f"{user} and further rewards into a WeightedSum"
            )
        super().__init__([reward])
        self.reward = reward
        self._name = reward.name
        self._last: tuple[Sequence[str], Sequence[Prompt], Sequence[float] | Tensor] | None = None

    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> Sequence[float] | Tensor:
        """Score completions, or return the kept values if these very objects were scored last."""
        if self._last is None or self._last[0] is not completions or self._last[1] is not prompts:
            self._last = (completions, prompts, self.reward(completions, prompts))
        return self._last[2]

    def overlaps(self, prompt: Prompt) -> int:
        """0: the values belong to a whole batch."""
        return 0

    def turn_rewards(self, completion: str, prompt: Prompt) -> None:
        """None: the last turn gets the whole reward."""


class _OverCorrectness(RewardFunction):
    """Base of length rewards that depend on whether a completion is right; their terms include the reward for correctness.

    Args:
        reward: The reward for correctness.
        weights: Its weight, and the weight of this reward.
        name: Name in logs.
    """

    measures_correctness = False

    def __init__(self, reward: RewardFunction, weights: tuple[float, float], name: str | None) -> None:
        self.reward = _CachedReward(reward, type(self).__name__)
        self.weights = weights
        self._name = name

    def terms(self) -> list[tuple[RewardFunction, float]]:
        """The reward for correctness and this reward, each with its weight."""
        return [(self.reward, self.weights[0]), (self, self.weights[1])]

    def _judged(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> tuple[list[int], list[bool]]:
        """Length and correctness of each of B completions; a reward of at least 1.0 means right."""
        lengths = token_counts(type(self).__name__, completions)
        return lengths, [float(value) >= 1.0 for value in self.reward(completions, prompts)]


class CosineLength(_OverCorrectness):
    """Replaces a reward for correctness by one that also depends on length.

    With the defaults, a short right completion earns the most and a short wrong one the least. The reward for correctness is
    still logged, with weight 0.

    Args:
        reward: The reward for correctness: a completion is right if it earns 1.0.
        max_tokens: The limit, usually the sampler's `max_new_tokens`; the stop token counts.
        right_shortest: Reward of a right completion of length 0.
        right_longest: Reward of a right completion at the limit.
        wrong_shortest: Reward of a wrong completion of length 0.
        wrong_longest: Reward of a wrong completion at the limit.
        at_limit: Reward of every completion that reaches the limit; None for the value of the formula.
        name: Name in logs; None for `cosine_length`.

    Raises:
        ConfigError: If `reward` does not measure correctness.
    """

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
        super().__init__(reward, (0.0, 1.0), name)
        self.max_tokens = max_tokens
        self.right, self.wrong = (right_shortest, right_longest), (wrong_shortest, wrong_longest)
        self.at_limit = at_limit

    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[float]:
        """The reward of each of B completions."""
        return [self._value(length, right) for length, right in zip(*self._judged(completions, prompts), strict=True)]

    def _value(self, length: int, right: bool) -> float:
        if length >= self.max_tokens and self.at_limit is not None:
            return self.at_limit
        shortest, longest = self.right if right else self.wrong
        return longest + (shortest - longest) * (1 + math.cos(math.pi * min(length / self.max_tokens, 1.0))) / 2


class GroupLength(_OverCorrectness):
    """Adds to a reward for correctness a reward for being shorter than the other completions of the same prompt.

    Args:
        reward: The reward for correctness, which has weight 1: a completion is right if it earns 1.0.
        weight: Weight of the length reward, which lies between -0.5 and 0.5. The paper raises the weight during training, and
            does not give its value.
        name: Name in logs; None for `group_length`.

    Raises:
        ConfigError: If `reward` does not measure correctness.
    """

    def __init__(self, reward: RewardFunction, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(reward, (1.0, weight), name)

    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[float]:
        """The length reward of each of B completions, before weighting."""
        lengths, right = self._judged(completions, prompts)
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


def token_counts(reward: str, completions: Sequence[str]) -> list[int]:
    """Length in tokens of each of B completions, for a reward of this name; the stop token counts.

    Raises:
        RewardError: If a completion is a plain string, which has no known number of tokens.
    """
    lengths = [completion.num_tokens for completion in completions if isinstance(completion, Completion)]
    if len(lengths) < len(completions):
        raise RewardError(
            f"{reward}: completions are plain strings without a number of tokens; pass completions from a rollout, or "
            "Completion(text, num_tokens, finished)"
        )
    return lengths
