"""Dynamic sampling: groups that teach nothing are replaced by others (DAPO, arXiv 2503.14476, section 3.2 and equation 11).

    0 < |{o_i : o_i is right}| < G      for each group of G completions that is trained on

Where all completions of a prompt are right, or all are wrong, every advantage is 0: the more of a rollout's groups tie, the fewer
are left to average the noise of the gradient out. So more prompts are sampled until P groups teach something.

- What ties: a group is judged by the parts of the reward that measure correctness, so that one whose completions differ in a
  penalty for length alone is replaced, as in the paper; by the whole reward where no part measures correctness. Right and wrong
  are taken as the values of these parts: partial credit (of code that passes some of its tests) tells completions apart too. A
  group whose whole rewards tie, or whose completions are all left out of the loss, is replaced too (with `PerRewardAdvantage`,
  whose parts may differ where their sum ties, it might have taught something).
- Replacements are the next prompts of the order. An extra rollout asks for as many as should make up for what is missing at the
  yield of this rollout so far, in quarters of P (so that some are to spare, and a run is the same on any number of ranks that
  divides a quarter), and for at most P.
- The first P groups in the order of the prompts are trained on, not those that were finished first, which would favour short
  completions. What teaches beyond P is dropped: by the next rollout it would be of an older policy, whose first minibatch would
  no longer be exactly on-policy.
- Departure: the paper samples without limit. Here it ends after `max_extra_rollouts` (verl ends the run at its
  `filter_groups.max_num_gen_batches`). What is still missing is then filled with groups that tie, whose advantage is set to 0, so
  that the step has its usual size and denominators; the policy gradient computes nothing for them.
- Ranks count the groups of all of them, so that all make the same extra rollouts of the same size; a rank with more groups than
  its share gives them to those with fewer.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hybrid_lightning.configurable import Configurable
from hybrid_lightning.errors import ConfigError


class DynamicSampling(Configurable):
    """Replaces groups that teach nothing, within a bounded number of extra rollouts.

    Args:
        max_extra_rollouts: Beside the first one, each of at most `prompts_per_rollout` prompts.

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
        """How many prompts the next extra rollout completes, over all ranks.

        Args:
            useful: Groups so far that teach something.
            sampled: Groups so far.
            wanted: P.
            extra_rollouts: That have been made.
            ranks: The result is a multiple of this; P is one too.

        Returns:
            At most P; 0 if there are enough groups, or no more may be sampled.
        """
        missing = wanted - useful
        if missing <= 0 or extra_rollouts >= self.max_extra_rollouts:
            return 0
        needed = missing * sampled / useful if useful else wanted
        quarter = math.ceil(wanted / 4)
        return min(wanted, _round_up(_round_up(needed, quarter), ranks))


def _round_up(number: float, step: int) -> int:
    return math.ceil(number / step) * step


def teaching_groups(total: Tensor, correctness: Sequence[Tensor], taught: Tensor, samples_per_prompt: int) -> Tensor:
    """Which groups teach something (see above).

    Args:
        total: [B] rewards.
        correctness: Parts of the reward that measure correctness, [B] each; may be none.
        taught: [B] bool: completions that the loss sees.
        samples_per_prompt: G.

    Returns:
        [P] bool.
    """

    def differs(values: Tensor) -> Tensor:
        groups = values.view(-1, samples_per_prompt)
        return groups.amax(dim=1) > groups.amin(dim=1)

    in_correctness = torch.stack([differs(part) for part in correctness or [total]]).any(dim=0)
    return in_correctness & differs(total) & taught.view(-1, samples_per_prompt).any(dim=1)


def choose_groups(useful: Tensor, wanted: int) -> Tensor:
    """Positions of the groups to train on: the first that are useful, and where they are too few the first of the others.

    Args:
        useful: [N] bool in the order of the prompts, N at least `wanted`.
        wanted: P.

    Returns:
        [P] int64, ascending, so that groups that fill up lie among the others.
    """
    first = torch.argsort((~useful).long(), stable=True)[:wanted]
    return first.sort().values


def share_groups(owners: Sequence[int], ranks: int, minibatches: int) -> list[list[int]]:
    """Deal chosen groups evenly to ranks, moving few.

    Args:
        owners: The rank that sampled each of P groups; P is a multiple of `ranks`.
        ranks: How many there are.
        minibatches: That the groups are cut into. Where these can be dealt evenly each of them is, so that it has the same groups
            however many ranks share it.

    Returns:
        Of each rank the numbers of its P / ranks groups, ascending.

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
