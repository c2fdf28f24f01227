"""Dynamic sampling: replace groups that teach nothing (DAPO, arXiv 2503.14476, section 3.2 and equation 11).

    0 < |{o_i : o_i is right}| < G      for each group of G completions that is trained on

Axes: P prompts (groups) of a rollout, G completions per prompt, K turns.

If all completions of a prompt are right, or all are wrong, every advantage of the group is 0. The more such groups a rollout
has, the fewer are left to average out the noise of the gradient. So more prompts are sampled until P groups are useful.

- A group is useful if its completions differ in a part of the reward that measures correctness, so a group that differs only in a
  penalty for length is replaced, as in the paper. If no part measures correctness, the whole reward decides. The values of the
  parts count, not just right and wrong: partial credit (for code that passes some of its tests) is a difference, too.
- A group is also replaced if its whole rewards are equal, or if all its completions are masked. (With `PerRewardAdvantage` such a
  group might have been useful, since the parts may differ although their sums are equal.) Episodes that are left out because
  their environment failed do not count. With credit by turn a group is useful if it is useful in one of its turns, judged by the
  rewards from that turn on.
- Replacements are the next prompts of the order. The size of an extra rollout follows from the share of useful groups so far: as
  many prompts as should give the missing groups, rounded up to quarters of P, and at most P. Rounding up leaves a reserve, and
  makes a run the same on any number of ranks that divides a quarter.
- The first P useful groups in the order of the prompts are trained on, not the first to finish, which would favour short
  completions. Further useful groups are dropped: in the next rollout they would come from an older policy, and its first
  minibatch would no longer be exactly on-policy.
- Departure: the paper samples without limit. Here sampling ends after `max_extra_rollouts` (verl ends the run at its
  `filter_groups.max_num_gen_batches`). Other groups then fill the gap. Their advantage is set to 0, so the step has its
  usual size and denominators, and the policy gradient ignores them.
- All ranks count the groups of all ranks, so that they make the same extra rollouts of the same size. A rank with more useful
  groups than its share gives some to ranks with fewer.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.shared.configurable import Configurable
from hybrid_lightning.types import Rewards, equal_groups


class DynamicSampling(Configurable):
    """Replaces groups that teach nothing, with a limited number of extra rollouts.

    Args:
        max_extra_rollouts: Rollouts in addition to the first one, each of at most `prompts_per_rollout` prompts.

    Raises:
        ConfigError: If `max_extra_rollouts` is below 1.

    Example:
        >>> DynamicSampling().prompts_to_add(useful=24, sampled=32, wanted=32, extra_rollouts=0, ranks=1)
        16
    """

    def __init__(self, max_extra_rollouts: int = 3) -> None:
        if max_extra_rollouts < 1:
            raise ConfigError(
                f"DynamicSampling: max_extra_rollouts={max_extra_rollouts} must be at least 1; to replace nothing, set "
                "model.dynamic_sampling=null"
            )
        self.max_extra_rollouts = max_extra_rollouts

    def prompts_to_add(self, useful: int, sampled: int, wanted: int, extra_rollouts: int, ranks: int) -> int:
        """Number of prompts in the next extra rollout, over all ranks: a multiple of the number of ranks.

        Args:
            useful: Number of useful groups so far.
            sampled: Number of all groups so far.
            wanted: P, a multiple of the ranks.
            extra_rollouts: Number of extra rollouts so far.
            ranks: Number of ranks.

        Returns:
            At most P; 0 if there are enough groups, or if the limit of extra rollouts is reached.
        """
        missing = wanted - useful
        if missing <= 0 or extra_rollouts >= self.max_extra_rollouts:
            return 0
        count = missing * sampled / useful if useful else wanted
        for step in (math.ceil(wanted / 4), ranks):
            count = math.ceil(count / step) * step
        return min(wanted, int(count))


def useful_groups(rewards: Rewards, correctness: Sequence[str], trained: Tensor) -> Tensor:
    """Which groups are useful (see the head of this file), [P] bool.

    Args:
        rewards: Rewards of P groups, perhaps by turn.
        correctness: Names of the parts that measure correctness; may be empty.
        trained: [P, G] bool, True for completions that contribute to the loss.
    """
    total, counted = rewards.total, rewards.counted
    parts = [rewards.parts[name] for name in correctness] or [total]
    equal_parts = torch.stack([equal_groups(part, counted) for part in parts]).all(dim=0)
    trained = trained.view(*trained.shape, *[1] * (total.dim() - 2)).expand_as(total)
    trained = trained if counted is None else trained & counted
    useful = ~equal_parts & ~equal_groups(total, counted) & trained.any(dim=1)
    return useful.view(len(useful), -1).any(dim=1)


def choose_groups(useful: Tensor, wanted: int) -> Tensor:
    """Positions of the groups to train on: the first useful groups and, if these are too few, the first of the others.

    From `useful`, [N] bool in the order of the prompts; [P] int64, ascending, so that useful and other groups are mixed.
    """
    return torch.argsort((~useful).long(), stable=True)[:wanted].sort().values


def share_groups(owners: Sequence[int], ranks: int, minibatches: int) -> list[list[int]]:
    """Distribute P chosen groups evenly over ranks, and move as few as possible away from the rank that sampled them.

    If possible each minibatch is distributed evenly, so that it has the same groups on any number of ranks. Returns for each rank
    the numbers of its P / ranks groups, ascending.

    Example:
        >>> share_groups([0, 1, 0, 0], ranks=2, minibatches=1)
        [[0, 2], [1, 3]]
    """
    size = len(owners) if len(owners) % (ranks * minibatches) else len(owners) // minibatches
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for start in range(0, len(owners), size):
        part = range(start, start + size)
        own = [[number for number in part if owners[number] == rank] for rank in range(ranks)]
        left_over = iter(sorted(number for numbers in own for number in numbers[size // ranks :]))
        for share, numbers in zip(shares, own, strict=True):
            kept = numbers[: size // ranks]
            share += sorted([*kept, *(next(left_over) for _ in range(size // ranks - len(kept)))])
    return shares
