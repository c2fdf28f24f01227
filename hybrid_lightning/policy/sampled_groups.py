"""Groups of completions that were sampled for a rollout, and the P of them, over all ranks, that are trained on.

Positions are in the order in which prompts were drawn, N over all ranks. Each draw is dealt to the ranks one by one, so that
position p lies on rank p % ranks, as its group p // ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hybrid_lightning.advantages import AdvantageEstimator
from hybrid_lightning.rollout.batching import join_rewards, join_rollouts, join_rows, join_sequences
from hybrid_lightning.rollout.dynamic_sampling import DynamicSampling, choose_groups, share_groups
from hybrid_lightning.rollout.loader import DrawPrompts
from hybrid_lightning.sharding.ranks import gather_columns, gather_objects, own_rows, world_size
from hybrid_lightning.types import Prompt, Rewards, Rollouts, Sequences


@dataclass(frozen=True)
class SampledGroups:
    """All groups of a rollout and its extra rollouts."""

    rollouts: Rollouts  # of this rank, N / ranks groups
    rewards: Rewards  # theirs
    useful: Tensor  # [N] bool: groups of all ranks that teach something, by position
    wanted: int  # P
    extra_rollouts: int

    def metrics(self) -> dict[str, float]:
        """What became of the groups.

        Returns:
            `sampling/extra_rollouts`; of the groups that were sampled, `sampling/kept_groups` (share that teach and are trained
            on) and `sampling/surplus_groups` (share that teach and are too many); of those that are trained on,
            `sampling/filled_groups` (share that teach nothing).
        """
        sampled, useful = len(self.useful), int(self.useful.sum())
        kept = min(useful, self.wanted)
        return {
            "sampling/extra_rollouts": float(self.extra_rollouts),
            "sampling/kept_groups": kept / sampled,
            "sampling/surplus_groups": (useful - kept) / sampled,
            "sampling/filled_groups": 1 - kept / self.wanted,
        }


@dataclass(frozen=True)
class TrainedGroups:
    """This rank's share of the groups that are trained on, B = P / ranks * G sequences."""

    sequences: Sequences  # B
    sampling_logprobs: Tensor  # [B, T]
    advantages: Tensor  # [B]
    of_sampled: Tensor  # [N / ranks * G] advantages of this rank's sampled groups, 0 for those that are not trained on


def sample_groups(
    rule: DynamicSampling,
    prompts: Sequence[Prompt],
    draw_more: DrawPrompts | None,
    sample: Callable[[Sequence[Prompt]], tuple[Rollouts, Rewards]],
    teaches: Callable[[Rollouts, Rewards], Tensor],
) -> SampledGroups:
    """Sample until enough groups teach something, or the bound is reached. All ranks have to call it.

    Args:
        rule: Says how much more to sample.
        prompts: This rank's P / ranks prompts of the rollout.
        draw_more: See `RolloutSource`; None for no extra rollouts.
        sample: Completes and scores prompts.
        teaches: Which of the groups, [n] bool.
    """
    ranks = world_size()
    wanted = len(prompts) * ranks
    parts = [sample(prompts)]
    useful = _by_position(teaches(*parts[0]), ranks)
    while draw_more is not None:
        # The same on every rank, since it follows from what all of them sampled.
        count = rule.prompts_to_add(int(useful.sum()), len(useful), wanted, len(parts) - 1, ranks)
        if not count:
            break
        parts.append(sample(draw_more(count)))
        useful = torch.cat([useful, _by_position(teaches(*parts[-1]), ranks)])
    rollouts, rewards = zip(*parts, strict=True)
    return SampledGroups(join_rollouts(rollouts), join_rewards(rewards), useful, wanted, len(parts) - 1)


def choose_trained(
    groups: SampledGroups, taught: Sequences, estimator: AdvantageEstimator, minibatches: int, rank: int
) -> TrainedGroups:
    """Choose P groups, estimate their advantages and deal them to the ranks. All ranks have to call it.

    Args:
        groups: That were sampled.
        taught: Their sequences as the loss sees them.
        estimator: Of the advantages, which compares none but the chosen groups.
        minibatches: That the P groups are cut into.
        rank: This process.
    """
    ranks, samples = world_size(), groups.rollouts.samples_per_prompt
    chosen = choose_groups(groups.useful, groups.wanted)
    in_gathered = chosen % ranks * len(groups.rollouts.prompts) + chosen // ranks
    rewards = _select(gather_rewards(groups.rewards), _rows_of(in_gathered, samples))
    advantages = estimator.of_rewards(rewards, samples).view(-1, samples)
    # The rewards of a group that fills up may differ, in a penalty for length for instance.
    advantages = torch.where(groups.useful[chosen][:, None], advantages, 0.0)
    of_sampled = advantages.new_zeros(len(groups.rollouts.prompts), samples)
    own = chosen % ranks == rank
    of_sampled[chosen[own] // ranks] = advantages[own]
    shares = share_groups((chosen % ranks).tolist(), ranks, minibatches)
    sequences, logprobs = _exchange(taught, groups.rollouts.sampling_logprobs, chosen.tolist(), shares, rank, samples)
    return TrainedGroups(sequences, logprobs, advantages[shares[rank]].flatten(), of_sampled.flatten())


def advantages_over_ranks(estimator: AdvantageEstimator, rewards: Rewards, samples_per_prompt: int) -> Tensor:
    """Let every rank estimate the advantages of all ranks' completions, and keep its own: an estimator knows of no ranks.

    All ranks have to call it.

    Args:
        estimator: Of the advantages.
        rewards: Of this rank's B completions; as many on every rank.
        samples_per_prompt: G.

    Returns:
        [B], those of this rank.
    """
    return own_rows(estimator.of_rewards(gather_rewards(rewards), samples_per_prompt))


def gather_rewards(rewards: Rewards) -> Rewards:
    """The rewards of all ranks' completions, those of each rank below each other; all ranks have to call it.

    Args:
        rewards: Of this rank's B completions; as many on every rank.
    """
    parts = {f"parts/{name}": part for name, part in rewards.parts.items()}
    columns = gather_columns({"total": rewards.total, "correct": rewards.correct, **parts})
    return replace(
        rewards,
        total=columns["total"],
        correct=columns["correct"],
        parts={name: columns[f"parts/{name}"] for name in rewards.parts},
    )


def _exchange(
    sequences: Sequences, logprobs: Tensor, chosen: list[int], shares: list[list[int]], rank: int, samples: int
) -> tuple[Sequences, Tensor]:
    """The groups of this rank's share, those that other ranks sampled fetched from them."""
    ranks = len(shares)

    def group(number: int) -> tuple[Sequences, Tensor]:
        start = chosen[number] // ranks * samples
        rows = sequences.rows(slice(start, start + samples))
        return rows, logprobs[start : start + samples, : rows.completion_ids.shape[1]]

    moved = [number for other, share in enumerate(shares) for number in share if chosen[number] % ranks != other]
    fetched: dict[int, tuple[Sequences, Tensor]] = {}
    if moved:  # on all ranks, or on none
        sent = {n: tuple(value.to("cpu") for value in group(n)) for n in moved if chosen[n] % ranks == rank}
        for of_rank in gather_objects(sent):
            fetched |= of_rank
    device = logprobs.device
    parts = [
        (fetched[number][0].to(device), fetched[number][1].to(device)) if number in fetched else group(number)
        for number in shares[rank]
    ]
    return join_sequences([part for part, _ in parts]), join_rows([values for _, values in parts])


def _by_position(own: Tensor, ranks: int) -> Tensor:
    """Values of all ranks' groups in the order of the prompts, [ranks * n], from this rank's [n]."""
    return gather_columns({"": own})[""].view(ranks, -1).T.flatten()


def _rows_of(groups: Tensor, samples: int) -> Tensor:
    """Rows of the completions of groups."""
    return (groups[:, None] * samples + torch.arange(samples, device=groups.device)).flatten()


def _select(rewards: Rewards, rows: Tensor) -> Rewards:
    parts = {name: part[rows] for name, part in rewards.parts.items()}
    return replace(rewards, total=rewards.total[rows], correct=rewards.correct[rows], parts=parts)
