"""Several rewards added up."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.rewards.base import RewardFunction
from hybrid_lightning.types import Prompt


class WeightedSum(RewardFunction):
    """Weighted sum of rewards; each is logged on its own, before weighting.

    Args:
        rewards: At least one; a sum within a sum counts as its terms. Names must differ: give two rewards of one class names.
        weights: One for each reward, negative ones punish; None for 1.0 each.
    """

    def __init__(self, rewards: list[RewardFunction], weights: list[float] | None = None) -> None:
        if not rewards:
            raise ConfigError("rewards=[]: give at least one reward")
        weights = [1.0] * len(rewards) if weights is None else list(weights)
        if len(weights) != len(rewards):
            raise ConfigError(f"weights={weights} for {len(rewards)} rewards: give one weight for each reward")
        if not all(math.isfinite(weight) for weight in weights):
            raise ConfigError(f"weights={weights}: every weight must be a finite number")
        self._terms = [
            (term, weight * inner) for reward, weight in zip(rewards, weights, strict=True) for term, inner in reward.terms()
        ]
        names = [term.name for term, _ in self._terms]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ConfigError(f"rewards: more than one is called {', '.join(repeated)}: give each a name of its own")

    def terms(self) -> list[tuple[RewardFunction, float]]:
        """The rewards and their weights, sums within this sum resolved."""
        return self._terms

    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> Tensor:
        """Weighted sum for each completion, [B]."""
        total = torch.zeros(len(completions))
        for term, weight in self._terms:
            total = total + weight * torch.as_tensor(term(completions, prompts), dtype=torch.float32)
        return total
