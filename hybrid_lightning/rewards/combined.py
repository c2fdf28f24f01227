"""Rewards made of other rewards.

- `WeightedSum` adds rewards up.
- `RewardBySet` scores each set of a mixture with its own reward.
- `as_reward` makes a reward from a function, or from several.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hybrid_lightning.errors import ConfigError, DataError, shorten
from hybrid_lightning.rewards.function import FunctionReward
from hybrid_lightning.rewards.reward_function import DelegatingReward, RewardFunction
from hybrid_lightning.types import Prompt

if TYPE_CHECKING:
    AnyReward = Callable[..., Any] | Sequence[Callable[..., Any]]
    AnyRewards = Sequence[Callable[..., Any]]
else:  # types that a config can give
    AnyReward, AnyRewards = RewardFunction, list[RewardFunction]


class WeightedSum(RewardFunction):
    """Weighted sum of rewards. Each reward is also logged on its own, before weighting.

    Args:
        rewards: At least one reward; a sum within the sum is replaced by its terms. The names must differ: give each of two
            rewards of the same class a name. In Python also functions (see `FunctionReward`).
        weights: One weight for each reward: negative for a penalty, 0 for a metric, which is logged but has no effect on
            training; None for 1.0 each. A metric that measures correctness still counts for accuracy.

    Raises:
        ConfigError: If no reward is given, a weight is missing or not finite, or two rewards have the same name.
    """

    def __init__(self, rewards: AnyRewards, weights: list[float] | None = None) -> None:
        if not rewards:
            raise ConfigError("rewards=[]; give at least one reward")
        made = self._init_args["rewards"] = [as_reward(reward) for reward in rewards]
        weights = [1.0] * len(rewards) if weights is None else list(weights)
        if len(weights) != len(rewards):
            raise ConfigError(f"weights={weights} for {len(rewards)} rewards; give one weight for each reward")
        if not all(math.isfinite(weight) for weight in weights):
            raise ConfigError(f"weights={weights} are not all finite; give finite numbers")
        self._terms = [
            (term, weight * inner) for reward, weight in zip(made, weights, strict=True) for term, inner in reward.terms()
        ]
        names = [term.name for term, _ in self._terms]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ConfigError(f"rewards: more than one is named {', '.join(repeated)}; give each its own name")

    def terms(self) -> list[tuple[RewardFunction, float]]:
        """The rewards and their weights; a sum within this sum is replaced by its terms."""
        return self._terms

    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> Tensor:
        """Weighted sum of the rewards of each completion, [B] float32."""
        total = torch.zeros(len(completions))
        for term, weight in self._terms:
            total = total + weight * torch.as_tensor(term(completions, prompts), dtype=torch.float32)
        return total


class RewardBySet(DelegatingReward):
    """Scores a completion by the reward for its prompt's set: mathematics by `MathMatch`, code by `CodeTests`, and so on.

    Args:
        rewards: Name of the set (as in the data source `Mixture`) -> its reward, which must not be a sum. If all sets share a
            reward, such as a format reward, put it and this one into a `WeightedSum`.
        name: Name in logs; None for `reward_by_set`.

    Raises:
        ConfigError: If no set is given, a reward is a sum, or some of the rewards measure correctness and others do not.
    """

    def __init__(self, rewards: dict[str, RewardFunction], name: str | None = None) -> None:
        if not rewards:
            raise ConfigError("RewardBySet: rewards={}; give each set a reward, as in rewards: {gsm8k: MathMatch}")
        for set_name, reward in rewards.items():
            if reward.terms() != [(reward, 1.0)]:
                raise ConfigError(
                    f"RewardBySet: the reward of set {set_name!r} is a sum; give the set one reward, and put RewardBySet and the "
                    "rewards that all sets share into a WeightedSum"
                )
        if len({reward.measures_correctness for reward in rewards.values()}) > 1:
            kinds = ", ".join(f"{key}: {value.measures_correctness}" for key, value in rewards.items())
            raise ConfigError(f"RewardBySet: some rewards measure correctness and others do not ({kinds}); use only one kind")
        super().__init__(list(rewards.values()))
        self.rewards = rewards
        self._name = name

    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> Tensor:
        """Score B completions, with one call of each set's reward."""
        positions: dict[str, list[int]] = defaultdict(list)
        for position, prompt in enumerate(prompts):
            positions[prompt.set_name].append(position)
            self.scorer(prompt)
        values = torch.zeros(len(completions), dtype=torch.float64)
        for set_name, rows in positions.items():
            own = self.rewards[set_name]([completions[row] for row in rows], [prompts[row] for row in rows])
            if len(own) != len(rows):
                raise ValueError(f"the reward of set {set_name!r} returned {len(own)} values for {len(rows)} completions")
            values[rows] = torch.as_tensor(own, dtype=torch.float64)
        return values

    def scorer(self, prompt: Prompt) -> RewardFunction:
        """The reward for the prompt's set."""
        if prompt.set_name not in self.rewards:
            raise DataError(
                f"RewardBySet: {prompt.place} belongs to set {prompt.set_name!r}, which has no reward; the sets with a reward "
                f"are {', '.join(self.rewards)}; use the set names of the data source"
            )
        return self.rewards[prompt.set_name]


def as_reward(given: AnyReward) -> RewardFunction:
    """A reward unchanged, a function as a `FunctionReward`, or a list of both as their sum.

    Raises:
        ConfigError: If it is something else, or if the function or the sum is invalid.
    """
    if isinstance(given, RewardFunction):
        return given
    if isinstance(given, (list, tuple)):
        return WeightedSum(list(given))
    if not callable(given) or isinstance(given, type):
        raise ConfigError(f"reward={shorten(given)}; give a reward such as MathMatch(), a function, or a list of them")
    return FunctionReward(given)
