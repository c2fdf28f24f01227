"""Group-relative advantages: how much better a completion is than the others of its prompt.

GRPO (DeepSeekMath, arXiv 2402.03300): A = (R - mean) / (std + eps) over the G samples of a prompt.

Departures: std is the unbiased one and eps = 1e-4 is added to it, as in TRL; the paper says neither. Where all rewards of a
group tie, A is exactly 0, while R - mean is rounding noise (eight rewards of 0.1 leave -7e-9 in float32), and 1 / eps would make
a gradient of that.

Axes: P prompts, G samples per prompt, B = P * G in prompt-major order.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from hybrid_lightning.errors import ConfigError, RewardError
from hybrid_lightning.parts import Part


class AdvantageEstimator(Part, ABC):
    """Base class of estimators: a subclass maps rewards in groups, [P, G], to advantages in groups.

    Example:
        >>> class LeaveOneOut(AdvantageEstimator):
        ...     def estimate(self, groups):
        ...         return centred(groups) * groups.shape[1] / (groups.shape[1] - 1)
        >>> LeaveOneOut()(torch.tensor([1.0, 0.0]), samples_per_prompt=2).tolist()
        [1.0, -1.0]
    """

    @abstractmethod
    def estimate(self, groups: Tensor) -> Tensor:
        """Advantages of the rewards `groups`, both [P, G] with G at least 2; float32 or float64."""

    def __call__(self, rewards: Tensor, samples_per_prompt: int) -> Tensor:
        """Compute the advantage of each completion.

        Args:
            rewards: [B], finite.
            samples_per_prompt: G; neighbouring rewards belong to the same prompt.

        Returns:
            [B] float32 (float64 for float64 rewards), without gradient.

        Raises:
            ConfigError: if the rewards do not come in groups of G, or G is below 2.
            RewardError: if a reward is not finite.
        """
        if samples_per_prompt < 2:
            raise ConfigError(
                f"samples_per_prompt={samples_per_prompt}: {type(self).__name__} compares the completions of a prompt with "
                "each other; set samples_per_prompt to 2 or more."
            )
        if rewards.dim() != 1 or len(rewards) % samples_per_prompt:
            raise ConfigError(
                f"rewards have shape {tuple(rewards.shape)}, which is not [prompts * {samples_per_prompt}]: give one reward a "
                f"completion, {samples_per_prompt} neighbours a prompt."
            )
        bad = (~torch.isfinite(rewards)).nonzero().flatten().tolist()
        if bad:
            raise RewardError(
                f"the reward of completion {bad[0]} is {rewards[bad[0]].item()} ({len(bad)} of {len(rewards)} are not finite): "
                "make the reward function return a finite number for every completion."
            )
        groups = rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32)).view(-1, samples_per_prompt)
        return (self.estimate(groups) if len(groups) else groups).flatten()


class GroupAdvantage(AdvantageEstimator):
    """GRPO's: (R - mean) / (std + eps), both over the group, std unbiased.

    Args:
        eps: added to the standard deviation.

    Raises:
        ConfigError: if `eps` is not positive.
    """

    def __init__(self, eps: float = 1e-4) -> None:
        self.eps = _positive(eps, type(self).__name__)

    def estimate(self, groups: Tensor) -> Tensor:
        """Advantages of `groups`, [P, G]."""
        return centred(groups) / (groups.std(dim=1, keepdim=True) + self.eps)


class GroupMeanAdvantage(AdvantageEstimator):
    """Dr. GRPO's (arXiv 2503.20783): R - mean over the group. Without std, easy and hard prompts are not weighted up."""

    def estimate(self, groups: Tensor) -> Tensor:
        """Advantages of `groups`, [P, G]."""
        return centred(groups)


class BatchStdAdvantage(AdvantageEstimator):
    """Group mean, batch scale (arXiv 2508.08221): (R - mean over the group) / (std over all rewards given + eps).

    The batch is what one call gets: with several ranks, each scales by its own rewards.

    Args:
        eps: added to the standard deviation.

    Raises:
        ConfigError: if `eps` is not positive.
    """

    def __init__(self, eps: float = 1e-4) -> None:
        self.eps = _positive(eps, type(self).__name__)

    def estimate(self, groups: Tensor) -> Tensor:
        """Advantages of `groups`, [P, G]."""
        return centred(groups) / (groups.std() + self.eps)


def centred(groups: Tensor) -> Tensor:
    """Rewards less their group's mean, both [P, G]; exactly 0 in a group whose rewards all tie."""
    tied = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    return torch.where(tied, 0.0, groups - groups.mean(dim=1, keepdim=True))


def _positive(eps: float, name: str) -> float:
    if not (math.isfinite(eps) and eps > 0):
        raise ConfigError(f"{name}: eps={eps} must be finite and above 0, since it keeps the division defined; set e.g. 1e-4.")
    return eps
