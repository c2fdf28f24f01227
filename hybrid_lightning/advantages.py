"""Group-relative advantages: how much better a completion is than the others of its prompt. Swap estimators by class.

Axes: P prompts, G samples per prompt, B = P * G in prompt-major order; R are rewards, means and standard deviations are over a
group where nothing else is said. The batch is a rollout, over all ranks.

- `GroupAdvantage`, GRPO (DeepSeekMath, arXiv 2402.03300): A = (R - mean) / (std + eps)
- `GroupMeanAdvantage`, Dr. GRPO (arXiv 2503.20783): A = R - mean
- `BatchStdAdvantage` (arXiv 2508.08221; TRL's `scale_rewards="batch"`): A = (R - mean) / (std over the batch + eps)
- `LeaveOneOutAdvantage`, RLOO (Back to Basics, arXiv 2402.14740): A = R - mean over the other G - 1 samples, which is G / (G -
  1) times `GroupMeanAdvantage`: the baseline does not hold the completion's own reward, so that it leaves the policy gradient
  unbiased. The loss is another class here: the paper's is REINFORCE on whole sequences, which on-policy is `GRPOLoss` but for
  the mean over tokens; TRL's RLOOTrainer clips the ratio of whole sequences.
- `PerRewardAdvantage`, GDPO (arXiv 2601.05242): for each reward k A_k = (R_k - mean) / (std + eps), then S = sum_k weight_k A_k
  and A = S / (std of S over the batch + eps). Where rewards are added up before they are normalised, different combinations of
  them can end up with the same advantage; here each keeps its say, as much as its weight, however widely it spreads. The paper
  subtracts the mean of S over the batch as well (TRL's "normalize_then_sum", too): it is zero, since that of every group is,
  but for rounding, which would make a gradient where all rewards tie.

Departures of all from their papers: a standard deviation is the unbiased one and eps = 1e-4 is added to it, as in TRL. Where
all rewards of a group tie, A is exactly 0, while R - mean is rounding noise (eight rewards of 0.1 leave -7e-9 in float32), and
1 / eps would make a gradient of that.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from hybrid_lightning.configurable import Configurable
from hybrid_lightning.errors import ConfigError, RewardError
from hybrid_lightning.types import Rewards

__all__ = [
    "AdvantageEstimator",
    "BatchStdAdvantage",
    "GroupAdvantage",
    "GroupMeanAdvantage",
    "LeaveOneOutAdvantage",
    "PerRewardAdvantage",
    "centred",
]


class AdvantageEstimator(Configurable, ABC):
    """Base class of estimators: a subclass maps rewards in groups, [P, G], to advantages in groups.

    In training P is all prompts of a rollout, over all ranks, so that what is computed over more than a group does not depend on
    the number of devices.

    Example:
        >>> class BestOfGroup(AdvantageEstimator):
        ...     def estimate(self, groups):
        ...         return (groups - groups.amax(dim=1, keepdim=True))
        >>> BestOfGroup()(torch.tensor([1.0, 0.0]), samples_per_prompt=2).tolist()
        [0.0, -1.0]
    """

    divides_by_group_std = False  # so that prompts whose completions hardly differ weigh more; see `PolicyLoss.takes_group_std`

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
        groups = self.groups(rewards, samples_per_prompt)
        return (self.estimate(groups) if len(groups) else groups).flatten()

    def of_rewards(self, rewards: Rewards, samples_per_prompt: int) -> Tensor:
        """Compute the advantage of each completion from all that is known of its rewards; here of their weighted sum.

        Args:
            rewards: B totals, and the parts that they are made of.
            samples_per_prompt: G.

        Returns:
            As `__call__`.
        """
        return self(rewards.total, samples_per_prompt)

    def check_samples(self, samples_per_prompt: int) -> None:
        """Make sure that there are completions to compare; asked before anything is generated.

        Args:
            samples_per_prompt: G.

        Raises:
            ConfigError: if G is below 2.
        """
        if samples_per_prompt < 2:
            raise ConfigError(
                f"samples_per_prompt={samples_per_prompt}: {type(self).__name__} compares the completions of a prompt with "
                "each other; set samples_per_prompt to 2 or more."
            )

    def groups(self, rewards: Tensor, samples_per_prompt: int) -> Tensor:
        """Checked rewards as [P, G]; arguments and errors as in `__call__`."""
        self.check_samples(samples_per_prompt)
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
        return rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32)).view(-1, samples_per_prompt)


def centred(groups: Tensor) -> Tensor:
    """Rewards less their group's mean, both [P, G]; exactly 0 in a group whose rewards all tie."""
    tied = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    return torch.where(tied, 0.0, groups - groups.mean(dim=1, keepdim=True))


def positive(eps: float, name: str) -> float:
    """The `eps` of the estimator `name`.

    Raises:
        ConfigError: if it is not finite and positive.
    """
    if not (math.isfinite(eps) and eps > 0):
        raise ConfigError(f"{name}: eps={eps} must be finite and above 0, since it keeps the division defined; set e.g. 1e-4.")
    return eps


class GroupAdvantage(AdvantageEstimator):
    """GRPO's: (R - mean) / (std + eps), both over the group, std unbiased.

    Args:
        eps: added to the standard deviation.

    Raises:
        ConfigError: if `eps` is not positive.
    """

    divides_by_group_std = True

    def __init__(self, eps: float = 1e-4) -> None:
        self.eps = positive(eps, type(self).__name__)

    def estimate(self, groups: Tensor) -> Tensor:
        """Advantages of `groups`, [P, G]."""
        return centred(groups) / (groups.std(dim=1, keepdim=True) + self.eps)


class GroupMeanAdvantage(AdvantageEstimator):
    """Dr. GRPO's: R - mean over the group. Without std, easy and hard prompts are not weighted up."""

    def estimate(self, groups: Tensor) -> Tensor:
        """Advantages of `groups`, [P, G]."""
        return centred(groups)


class BatchStdAdvantage(AdvantageEstimator):
    """(R - mean over the group) / (std over all rewards of the rollout + eps): an easy or hard prompt is not weighted up.

    Args:
        eps: added to the standard deviation.

    Raises:
        ConfigError: if `eps` is not positive.
    """

    def __init__(self, eps: float = 1e-4) -> None:
        self.eps = positive(eps, type(self).__name__)

    def estimate(self, groups: Tensor) -> Tensor:
        """Advantages of `groups`, [P, G]."""
        return centred(groups) / (groups.std() + self.eps)


class LeaveOneOutAdvantage(AdvantageEstimator):
    """RLOO's: R - mean over the other completions of the prompt."""

    def estimate(self, groups: Tensor) -> Tensor:
        """Advantages of `groups`, [P, G]."""
        samples = groups.shape[1]
        return centred(groups) * (samples / (samples - 1))


class PerRewardAdvantage(AdvantageEstimator):
    """GDPO's: each reward of a `WeightedSum` normalised within its group, summed with the weights, and scaled over the rollout.

    Args:
        eps: added to each standard deviation.

    Raises:
        ConfigError: if `eps` is not positive.
    """

    divides_by_group_std = True

    def __init__(self, eps: float = 1e-4) -> None:
        self.eps = positive(eps, type(self).__name__)

    def of_rewards(self, rewards: Rewards, samples_per_prompt: int) -> Tensor:
        """Compute the advantage of each completion from the parts of its reward (see `AdvantageEstimator.of_rewards`)."""
        total = torch.zeros_like(self.groups(rewards.total, samples_per_prompt))
        for name, part in rewards.parts.items():
            total = total + rewards.weights.get(name, 1.0) * self._normalised(self.groups(part, samples_per_prompt))
        return self._scaled(total).flatten()

    def estimate(self, groups: Tensor) -> Tensor:
        """Advantages of a single reward, [P, G]."""
        return self._scaled(self._normalised(groups))

    def _normalised(self, groups: Tensor) -> Tensor:
        return centred(groups) / (groups.std(dim=1, keepdim=True) + self.eps)

    def _scaled(self, groups: Tensor) -> Tensor:
        return groups / (groups.std() + self.eps) if len(groups) else groups
