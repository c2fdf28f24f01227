"""Group-relative advantages: how much better a completion is than the other completions of its prompt. Swap estimators by class.

Axes: P prompts, G samples per prompt, K turns. R is the reward. Means and standard deviations are over a group, unless marked
"over the batch", which means the whole rollout over all ranks.

- `GroupAdvantage`, GRPO (DeepSeekMath, arXiv 2402.03300): A = (R - mean) / (std + eps)
- `GroupMeanAdvantage`, Dr. GRPO (arXiv 2503.20783): A = R - mean
- `BatchStdAdvantage` (arXiv 2508.08221; TRL's `scale_rewards="batch"`): A = (R - mean) / (std over the batch + eps)
- `LeaveOneOutAdvantage`, RLOO (Back to Basics, arXiv 2402.14740): A = R - mean over the other G - 1 samples, which is G / (G - 1)
  times `GroupMeanAdvantage`. The baseline does not contain the completion's own reward, so the policy gradient stays unbiased.
  Choose the loss separately: the paper uses REINFORCE on whole sequences, which on-policy equals `GRPOLoss` except for the mean
  over tokens; TRL's RLOOTrainer clips the ratio of whole sequences.
- `PerRewardAdvantage`, GDPO (arXiv 2601.05242): A_k = (R_k - mean) / (std + eps) for each reward k, then S = sum_k weight_k A_k
  and A = S / (std of S over the batch + eps). If rewards are added up before they are normalised, different combinations of
  rewards can get the same advantage; here only its weight determines the influence of a reward, not the spread of its values. The
  paper (and TRL's "normalize_then_sum") also subtracts the mean of S over the batch. That mean is 0 up to rounding, since every
  group has mean 0, and the rounding would make a gradient if all rewards are equal.

- `ReinforcePlusPlusAdvantage`, REINFORCE++-baseline (arXiv 2501.03262): A = (R - mean) / (std of R - mean over the batch + eps).
  A mixture of easy and hard prompts does not make it smaller. As in the paper and in ms-swift, the standard deviation is over
  completions. OpenRLHF and verl compute it over tokens, and also subtract the mean over tokens. That mean is not 0 unless all
  completions have the same length, so groups of equal rewards would get a gradient. The paper's loss is `GRPOLoss`, with k2 for
  k3.

All estimators depart from their papers in two ways. The standard deviation is the unbiased one, and eps = 1e-4 is added to it, as
in TRL. If all rewards of a group are equal, A is exactly 0: R - mean would be rounding noise (eight rewards of 0.1 leave -7e-9 in
float32), and division by eps would turn it into a gradient.

Completions that are left out (see `Rewards.counted`) do not count: their advantage is 0, and a group consists of the remaining
completions. In a group of one the advantage is 0.

Credit by turn (`model.credit=turn`). An episode has turns k = 1, 2, ... A reward before turn k cannot depend on the policy's
message in turn k. So the tokens of turn k may be weighted by the reward to go, G_k (the sum of the rewards of turn k and all
later turns), instead of the whole reward: the expected gradient is the same, with less noise. Every estimator here supports this.
It uses G_k for R; its group consists of the members that have a turn k, and its batch of all turns of all episodes. This affects
the bias as follows:

- The mean over the *other* members is unbiased: which of them reach turn k, and with which reward, does not depend on this
  member's message in turn k. But they are in other states at turn k, so the mean does not reflect whether this member's position
  was good, unlike a critic or a group of equal states (GiGPO, arXiv 2505.10978). That costs variance.
- A mean that contains the member's own G_k multiplies A by (n - 1) / n if n members have a turn k. At turn 1 this factor is the
  same for all; later it gives less weight to turns that few members reach. `LeaveOneOutAdvantage` does not have this factor.
- If only one member reaches turn k, its A is 0. So with every estimator, the gradient of turn k is weighted by the probability
  that another member reaches it, and the last turns of an episode that outlasts its group train nothing. More samples per prompt
  make this rarer. (Without a baseline, A = G_k would be unbiased, but many times larger than any other A if all rewards have the
  same sign.)
- The standard deviation contains the member's own G_k, and favours turns at which G_k hardly differs; with two members, A is
  +-0.7, whatever the difference.
- A loss with a mean over the tokens of a sequence (`GRPOLoss`, `GSPOTokenLoss`, `SAPOLoss`) divides turn k by a length that
  depends on later turns; `DrGRPOLoss` does not, and `DAPOLoss` hardly does.

`LeaveOneOutAdvantage` with `DrGRPOLoss` has the least bias. One scheme is not offered: normalising the reward of each turn among
the members that have it, and adding up the rewards of later turns, as MT-GRPO (arXiv 2505.11821) does for two turns. The number
of subtracted means then depends on when the policy stops, so the policy pays the mean reward of each turn that it takes (verl
issue 7244).
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.shared.configurable import Configurable
from hybrid_lightning.types import Rewards, counted_groups

__all__ = [
    "AdvantageEstimator",
    "BatchStdAdvantage",
    "GroupAdvantage",
    "GroupMeanAdvantage",
    "LeaveOneOutAdvantage",
    "NoAdvantage",
    "PerRewardAdvantage",
    "ReinforcePlusPlusAdvantage",
    "centred",
]


class AdvantageEstimator(Configurable, ABC):
    """Base class of estimators. A subclass maps rewards in groups, [P, G], to advantages in groups.

    Anything that depends on more than one group belongs in `rescale`, which gets all completions of a rollout over all ranks.
    The result then does not depend on the number of ranks.

    Example:
        >>> class BestOfGroup(AdvantageEstimator):
        ...     def estimate(self, groups):
        ...         return (groups - groups.amax(dim=1, keepdim=True))
        >>> BestOfGroup()(torch.tensor([[1.0, 0.0]])).tolist()
        [[0.0, -1.0]]
    """

    divides_by_group_std = False  # True favours prompts with almost equal rewards (see `PolicyLoss.takes_group_std`)

    @abstractmethod
    def estimate(self, groups: Tensor) -> Tensor:
        """Advantages for the rewards `groups`, both [P, G] with G at least 2; float32 or float64.

        If completions are left out, groups have different sizes, and `estimate` is called once for each size.
        """

    def rescale(self, advantages: Tensor, rewards: Tensor) -> Tensor:
        """Adjust the advantages that `estimate` returned by statistics of the whole rollout; by default unchanged.

        Both arguments are [N], for all completions that count, at least 2.
        """
        return advantages

    def __call__(self, rewards: Tensor, counted: Tensor | None = None) -> Tensor:
        """Compute the advantage of each completion, float32 (float64 for float64 rewards), without gradient.

        Args:
            rewards: [P, G], or by turn [P, G, K]; finite for all completions that count.
            counted: See `Rewards`, of the same shape or None.

        Returns:
            The advantages, in the shape of the rewards.

        Raises:
            ConfigError: If G is below 2.
        """
        self.check_samples(rewards.shape[1])
        groups, counted = _by_turn(_detached(rewards)), _by_turn(counted)
        return _from_turns(self._over_rollout(self._in_groups(groups, counted), groups, counted), rewards.shape)

    def of_rewards(self, rewards: Rewards) -> Tensor:
        """Compute the advantage of each completion, as `__call__`, from its rewards: by default from their weighted sum."""
        return self(rewards.total, rewards.counted)

    def check_samples(self, samples_per_prompt: int) -> None:
        """Check that there are completions to compare. Called before anything is generated.

        Raises:
            ConfigError: If G is below 2.
        """
        if samples_per_prompt < 2:
            raise ConfigError(
                f"samples_per_prompt={samples_per_prompt}: {type(self).__name__} compares the completions of a prompt with "
                "each other; set samples_per_prompt to 2 or more"
            )

    def _in_groups(self, groups: Tensor, counted: Tensor | None) -> Tensor:
        """Advantages within groups, both [K * P, G]."""
        rewards, advantages = groups.flatten(), torch.zeros_like(groups).flatten()
        for numbers in counted_groups(groups, counted):
            if numbers.shape[1] > 1:
                advantages[numbers] = self.estimate(rewards[numbers])
        return advantages.view_as(groups)

    def _over_rollout(self, advantages: Tensor, rewards: Tensor, counted: Tensor | None) -> Tensor:
        """Apply `rescale` to the advantages that count, [K * P, G]."""
        some = torch.ones_like(rewards, dtype=torch.bool) if counted is None else counted
        if int(some.sum()) > 1:
            advantages[some] = self.rescale(advantages[some], rewards[some])
        return advantages


class _DividedAdvantage(AdvantageEstimator):
    """Base class of estimators that divide by a standard deviation.

    Args:
        eps: Added to each standard deviation.

    Raises:
        ConfigError: If `eps` is not finite and positive.
    """

    def __init__(self, eps: float = 1e-4) -> None:
        if not (math.isfinite(eps) and eps > 0):
            raise ConfigError(
                f"{type(self).__name__}: eps={eps} must be finite and above 0, to avoid a division by 0; set e.g. 1e-4"
            )
        self.eps = eps

    def estimate(self, groups: Tensor) -> Tensor:
        """Rewards of `groups` minus the mean of their group, [P, G]; a subclass divides them."""
        return centred(groups)


class GroupAdvantage(_DividedAdvantage):
    """GRPO's advantage: (R - mean) / (std + eps), both over the group, std unbiased."""

    divides_by_group_std = True

    def estimate(self, groups: Tensor) -> Tensor:
        """Advantages of `groups`, [P, G]."""
        return centred(groups) / (groups.std(dim=1, keepdim=True) + self.eps)


class GroupMeanAdvantage(AdvantageEstimator):
    """Dr. GRPO's advantage: R - mean over the group. Without std, easy and hard prompts do not get more weight."""

    def estimate(self, groups: Tensor) -> Tensor:
        """Advantages of `groups`, [P, G]."""
        return centred(groups)


class BatchStdAdvantage(_DividedAdvantage):
    """(R - mean over the group) / (std over all rewards of the rollout + eps): easy and hard prompts do not get more weight."""

    def rescale(self, advantages: Tensor, rewards: Tensor) -> Tensor:
        """Advantages over the standard deviation of the rewards, [N]."""
        return advantages / (rewards.std() + self.eps)


class LeaveOneOutAdvantage(AdvantageEstimator):
    """RLOO's advantage: R - mean over the other completions of the prompt."""

    def estimate(self, groups: Tensor) -> Tensor:
        """Advantages of `groups`, [P, G]."""
        samples = groups.shape[1]
        return centred(groups) * (samples / (samples - 1))


class ReinforcePlusPlusAdvantage(_DividedAdvantage):
    """REINFORCE++-baseline's advantage: (R - mean over the group) / (its std over the rollout + eps)."""

    def rescale(self, advantages: Tensor, rewards: Tensor) -> Tensor:
        """Advantages over their standard deviation, [N]."""
        return advantages / (advantages.std() + self.eps)


class NoAdvantage(AdvantageEstimator):
    """Always 0: rewards are only measured, and nothing is learned from them. Use it to learn only from a teacher."""

    def estimate(self, groups: Tensor) -> Tensor:
        """Advantages of `groups`, [P, G]."""
        return torch.zeros_like(groups)

    def check_samples(self, samples_per_prompt: int) -> None:
        """Accept any number: nothing is compared, so one completion of a prompt is enough."""


class PerRewardAdvantage(GroupAdvantage):
    """GDPO's advantage: each reward is normalised in its group, and the weighted sum is divided by its std over the rollout."""

    def of_rewards(self, rewards: Rewards) -> Tensor:
        """Compute the advantage of each completion from the parts of its reward (see `AdvantageEstimator.of_rewards`)."""
        self.check_samples(rewards.total.shape[1])
        counted, whole = _by_turn(rewards.counted), _by_turn(_detached(rewards.total))
        total = torch.zeros_like(whole)
        for name, part in rewards.parts.items():
            total = total + rewards.weights.get(name, 1.0) * self._in_groups(_by_turn(_detached(part)), counted)
        return _from_turns(self._over_rollout(total, whole, counted), rewards.total.shape)

    def rescale(self, advantages: Tensor, rewards: Tensor) -> Tensor:
        """Advantages over their standard deviation, [N]."""
        return advantages / (advantages.std() + self.eps)


def _detached(rewards: Tensor) -> Tensor:
    """Rewards without gradient, in float32, or in float64 if they are."""
    return rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32))


def _by_turn(values: Tensor | None) -> Any:
    """The groups of each turn, one turn after the other, [K * P, G], from [P, G, K]; [P, G] and None stay unchanged."""
    return values if values is None or values.dim() == 2 else values.movedim(2, 0).flatten(0, 1)


def _from_turns(groups: Tensor, shape: torch.Size) -> Tensor:
    """Undo `_by_turn` for values of this shape."""
    return groups if len(shape) == 2 else groups.view(shape[2], *shape[:2]).movedim(0, 2)


def centred(groups: Tensor) -> Tensor:
    """Rewards minus the mean of their group, both [P, G]; exactly 0 in a group with equal rewards."""
    equal = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    return torch.where(equal, 0.0, groups - groups.mean(dim=1, keepdim=True))
