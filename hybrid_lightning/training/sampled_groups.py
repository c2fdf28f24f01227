"""The groups that all ranks sample for a rollout: their metrics, and the P groups to train on.

    sample_groups  ->  SampledGroups  ->  choose_trained  ->  TrainedRollout         with dynamic sampling
    advantages_over_ranks                                                            without: training uses all groups

Metrics have TRL's names.

Axes: N groups sampled over all ranks, G samples per prompt, B sequences of one rank, T completion tokens. The position of a group
is its number in the order in which prompts were drawn. Ranks take the prompts of a draw in turns, so position p is group
p // ranks of rank p % ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hybrid_lightning.advantages import AdvantageEstimator
from hybrid_lightning.episodes.episodes import token_advantages
from hybrid_lightning.losses import functional as F
from hybrid_lightning.rollout.batching import join_rewards, join_rollouts, join_rows, join_sequences
from hybrid_lightning.rollout.dynamic_sampling import DynamicSampling, choose_groups, share_groups
from hybrid_lightning.rollout.loader import DrawPrompts, TrainedRollout
from hybrid_lightning.sharding.ranks import gather_columns, gather_objects, own_rows, world_size
from hybrid_lightning.types import Prompt, Rewards, Rollouts, ScoredRollout, Sequences, counted_groups, equal_groups

# First parts of the names of rollout metrics: here and by `Generation.metrics`.
_OF_REWARDS = {"accuracy", "frac_reward_zero_std", "reward", "reward_std", "rewards", "solve_rate"}
ROLLOUT_METRICS = frozenset({*_OF_REWARDS, "completions", "episodes", "judge", "num_tokens", "sampling", "sets"})


@dataclass(frozen=True)
class SampledGroups:
    """All groups sampled for a rollout, in the first draw of prompts and in extra draws."""

    rollouts: Rollouts  # this rank's N / ranks groups
    rewards: Rewards  # rewards of this rank's groups
    useful: Tensor  # [N] bool, by position: groups that give a learning signal
    wanted: int  # P, groups to train on over all ranks
    extra_rollouts: int  # draws after the first

    def metrics(self) -> dict[str, float]:
        """Shares of groups that were sampled and used.

        Returns:
            `sampling/extra_rollouts`; as shares of the sampled groups, `sampling/kept_groups` (useful and trained on) and
            `sampling/surplus_groups` (useful but not needed); as a share of the trained groups, `sampling/filled_groups` (not
            useful).
        """
        sampled, useful = len(self.useful), int(self.useful.sum())
        kept = min(useful, self.wanted)
        return {
            "sampling/extra_rollouts": float(self.extra_rollouts),
            "sampling/kept_groups": kept / sampled,
            "sampling/surplus_groups": (useful - kept) / sampled,
            "sampling/filled_groups": 1 - kept / self.wanted,
        }

    def warning(self) -> str:
        """Message for groups that are trained on without a learning signal; "" if there are none."""
        filled = self.metrics()["sampling/filled_groups"]
        if not filled:
            return ""
        return (
            f"nothing is learned from {filled:.0%} of a rollout's groups, even after {self.extra_rollouts} extra rollouts: the "
            "prompts are too easy or too hard for the policy; give other data, or raise model.samples_per_prompt or "
            "model.dynamic_sampling.max_extra_rollouts (later rollouts only log this as sampling/filled_groups)"
        )


def sample_groups(
    rule: DynamicSampling,
    prompts: Sequence[Prompt],
    draw_more: DrawPrompts | None,
    sample: Callable[[Sequence[Prompt]], tuple[Rollouts, Rewards]],
    is_useful: Callable[[Rollouts, Rewards], Tensor],
) -> SampledGroups:
    """Sample until P groups are useful, or until the limit of extra rollouts. All ranks must call this.

    Each rank starts with P / ranks prompts; `is_useful` returns which of n groups give a learning signal, [n] bool.
    """
    ranks = world_size()
    wanted = len(prompts) * ranks
    parts = [sample(prompts)]
    useful = _by_position(is_useful(*parts[0]), ranks)
    while draw_more is not None:
        # The count is the same on every rank, since it depends on the groups of all ranks.
        count = rule.prompts_to_add(int(useful.sum()), len(useful), wanted, len(parts) - 1, ranks)
        if not count:
            break
        parts.append(sample(draw_more(count)))
        useful = torch.cat([useful, _by_position(is_useful(*parts[-1]), ranks)])
    rollouts, rewards = zip(*parts, strict=True)
    return SampledGroups(join_rollouts(rollouts), join_rewards(rewards), useful, wanted, len(parts) - 1)


def choose_trained(
    groups: SampledGroups,
    sequences: Sequences,
    estimator: AdvantageEstimator,
    minibatches: int,
    rank: int,
    credited: Rewards | None = None,
) -> tuple[TrainedRollout, Tensor]:
    """Choose P groups, estimate their advantages and spread them over the ranks. All ranks must call this.

    Args:
        groups: The sampled groups. Only the chosen groups enter the advantages.
        sequences: Their sequences as the loss sees them.
        estimator: Estimates advantages.
        minibatches: Number of minibatches that the P groups are split into.
        rank: Number of this rank.
        credited: Rewards to estimate advantages from, for each of K turns (see `rewards_to_go`); None for the groups' rewards.

    Returns:
        This rank's part of the groups to train on, B = P / ranks * G sequences, without metrics; and the advantages of all groups
        that this rank sampled, in the shape of `token_advantages`, 0 for groups that were not chosen.
    """
    ranks, samples, sampled = world_size(), groups.rollouts.samples_per_prompt, len(groups.rollouts.prompts)
    credited = groups.rewards if credited is None else credited
    turns = len(credited.total) // (sampled * samples)
    chosen = choose_groups(groups.useful, groups.wanted)
    of_turns = torch.arange(turns, device=chosen.device)[:, None]
    in_gathered = (chosen % ranks * turns + of_turns) * sampled + chosen // ranks  # [K, P]
    rewards = gather_rewards(credited).select(_rows_of(in_gathered.flatten(), samples))
    advantages = estimator.of_rewards(rewards, samples).view(turns, -1, samples)
    # A group that only fills up the rollout has no advantage, even if its rewards differ, as with a length penalty.
    advantages = torch.where(groups.useful[chosen][:, None], advantages, 0.0)
    of_sampled = advantages.new_zeros(turns, sampled, samples)
    own = chosen % ranks == rank
    of_sampled[:, chosen[own] // ranks] = advantages[:, own]
    credit = token_advantages(of_sampled.flatten(), groups.rollouts)
    shares = share_groups((chosen % ranks).tolist(), ranks, minibatches)
    of_rows = (groups.rollouts.sampling_logprobs, credit)
    sequences, (logprobs, trained) = _exchange(sequences, of_rows, chosen.tolist(), shares, rank, samples)
    counted = None if rewards.counted is None else rewards.counted.view(turns, -1, samples)[0, shares[rank]].flatten()
    return TrainedRollout(sequences, logprobs, trained, counted=counted), credit


def advantages_over_ranks(estimator: AdvantageEstimator, rewards: Rewards, samples_per_prompt: int) -> Tensor:
    """Advantages [B] of this rank's completions or turns, estimated from the rewards of all ranks.

    All ranks must call this, with the same number of completions each.
    """
    return own_rows(estimator.of_rewards(gather_rewards(rewards), samples_per_prompt))


def gather_rewards(rewards: Rewards) -> Rewards:
    """The rewards of all ranks' completions, rank by rank. All ranks must call this with equal numbers."""
    parts = {f"parts/{name}": part for name, part in rewards.parts.items()}
    fields = {"total": rewards.total, "correct": rewards.correct, "counted": rewards.counted}
    columns = gather_columns({name: value for name, value in {**fields, **parts}.items() if value is not None})
    gathered = {name: columns.get(name) for name in fields}
    return replace(rewards, **gathered, parts={name: columns[f"parts/{name}"] for name in rewards.parts})  # type: ignore[arg-type]


def rollout_metrics(rollouts: Rollouts, rewards: Rewards, credited: Rewards | None = None) -> dict[str, float]:
    """Compute the metrics of one rollout over all ranks. All ranks must call this, with the same number of prompts.

    Returns:
        - `reward`: mean over sequences.
        - `reward_std`: mean over groups of the unbiased standard deviation in a group.
        - `frac_reward_zero_std`: share of groups without a learning signal: in each turn, their credited rewards are all equal.
        - `rewards/{name}/mean` and `/std`: of each term of the reward.
        - `solve_rate/{all,none,mixed}`: shares of groups in which all, none or some completions are correct.
        - `accuracy`: share of correct completions; like `solve_rate`, only if a part of the reward measures correctness.
        - `completions/*`: lengths in sampled tokens, and `clipped_ratio`, the share that is not finished.
        - `num_tokens`: tokens of prompts and completions, with added tokens (the cost of a rollout).
        - `sets/{name}/{reward,accuracy,mean_length}`: for each set of a mixture.

        Completions that do not count appear only in `num_tokens`, which is the only metric if none counts.
    """
    sequences, samples = rollouts.sequences, rollouts.samples_per_prompt
    credited = rewards if credited is None else credited
    equal = equal_groups(credited.total, samples, credited.counted).view(-1, len(rollouts.prompts)).all(dim=0)
    columns = gather_columns(
        {
            "equal": equal.repeat_interleave(samples),
            "total": rewards.total,
            "correct": rewards.correct,
            "length": sequences.sampled_mask.sum(dim=1),
            "completion_tokens": sequences.completion_mask.sum(dim=1),
            "prompt_tokens": sequences.prompt_mask.sum(dim=1),
            "finished": rollouts.finished,
            **{f"rewards/{name}": part for name, part in rewards.parts.items()},
            **({} if rewards.counted is None else {"counted": rewards.counted}),
        }
    )
    counted, tokens = columns.get("counted"), columns["completion_tokens"].float().sum() + columns["prompt_tokens"].sum()
    rows_of_groups = counted_groups(columns["total"], samples, counted)
    if not rows_of_groups:
        return {"num_tokens": float(tokens)}
    groups = [columns["total"][rows] for rows in rows_of_groups]
    std = torch.cat([group.std(dim=1) if group.shape[1] > 1 else torch.zeros_like(group[:, 0]) for group in groups])
    all_equal = torch.cat([columns["equal"][rows[:, 0]] for rows in rows_of_groups])
    solved = torch.cat([columns["correct"][rows].float().mean(dim=1) for rows in rows_of_groups])
    if counted is not None:
        columns = {name: column[counted] for name, column in columns.items()}
    lengths = columns["length"].float()
    metrics = {
        "reward": columns["total"].mean(),
        "reward_std": std.mean(),
        "frac_reward_zero_std": all_equal.float().mean(),
        **({"accuracy": columns["correct"].float().mean(), **_solve_rates(solved)} if rewards.measures_correctness else {}),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1 - columns["finished"].float().mean(),
        "num_tokens": tokens,
    }
    for name in rewards.parts:
        part = columns[f"rewards/{name}"]
        metrics[f"rewards/{name}/mean"] = part.mean()
        metrics[f"rewards/{name}/std"] = part.std() if len(part) > 1 else torch.zeros(())
    for name, rows in _rows_of_sets(rollouts, lengths.device).items():
        rows = rows if counted is None else rows[counted]
        if not rows.any():
            continue
        metrics[f"sets/{name}/reward"] = columns["total"][rows].mean()
        if rewards.measures_correctness:
            metrics[f"sets/{name}/accuracy"] = columns["correct"][rows].float().mean()
        metrics[f"sets/{name}/mean_length"] = lengths[rows].mean()
    return {name: float(value) for name, value in metrics.items()}


def _solve_rates(solved: Tensor) -> dict[str, Tensor]:
    """Shares of groups, from the share of correct completions in each."""
    shares = {"all": solved == 1, "none": solved == 0, "mixed": (solved > 0) & (solved < 1)}
    return {f"solve_rate/{name}": share.float().mean() for name, share in shares.items()}


def _exchange(
    sequences: Sequences, values: Sequence[Tensor], chosen: list[int], shares: list[list[int]], rank: int, samples: int
) -> tuple[Sequences, list[Tensor]]:
    """The sequences and values of this rank's share, [B, T] or [B]; groups come from the ranks that sampled them."""
    ranks = len(shares)

    def group(number: int) -> tuple[Sequences, *tuple[Tensor, ...]]:
        start = chosen[number] // ranks * samples
        rows = sequences.rows(slice(start, start + samples))
        of_rows = [value[start : start + samples] for value in values]
        return rows, *(value if value.dim() == 1 else value[:, : rows.completion_ids.shape[1]] for value in of_rows)

    moved = [number for other, share in enumerate(shares) for number in share if chosen[number] % ranks != other]
    fetched: dict[int, tuple[Sequences, *tuple[Tensor, ...]]] = {}
    if moved:  # the same on all ranks
        sent = {n: tuple(value.to("cpu") for value in group(n)) for n in moved if chosen[n] % ranks == rank}
        for of_rank in gather_objects(sent):
            fetched |= of_rank
    device = sequences.completion_ids.device
    parts = [tuple(value.to(device) for value in fetched.get(number) or group(number)) for number in shares[rank]]
    own, *of_own = zip(*parts, strict=True)
    return join_sequences(own), [join_rows(value) for value in of_own]


def _rows_of_sets(rollouts: Rollouts, device: torch.device) -> dict[str, Tensor]:
    """Name of a set -> [all ranks' B] bool, its sequences; empty if the data is one set without a name."""
    if not rollouts.prompts[0].set_name:
        return {}
    names = [name for rank in gather_objects([prompt.set_name for prompt in rollouts.prompts]) for name in rank]
    of_sequence = [name for name in names for _ in range(rollouts.samples_per_prompt)]
    return {name: torch.tensor([other == name for other in of_sequence], device=device) for name in dict.fromkeys(names)}


def _by_position(own: Tensor, ranks: int) -> Tensor:
    """Values of all ranks' groups by position, [ranks * n], from the values of this rank's groups, [n]."""
    return gather_columns({"": own})[""].view(ranks, -1).T.flatten()


def _rows_of(groups: Tensor, samples: int) -> Tensor:
    """Rows of the completions of groups, given by group number."""
    return (groups[:, None] * samples + torch.arange(samples, device=groups.device)).flatten()


def with_advantages(rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> ScoredRollout:
    """The rollout for callbacks. If each token has its own advantage, a sequence gets the mean of its tokens' advantages."""
    if advantages.dim() == 2:
        advantages = F.sequence_means(advantages, rollouts.sequences.sampled_mask)
    return ScoredRollout(rollouts, rewards, advantages)
