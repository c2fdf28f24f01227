"""The groups that all ranks sample for a rollout: their metrics, their advantages, and their rows to train on.

    sample_groups     with dynamic sampling: samples more groups, and marks the useful ones
    with_advantages   estimates the advantages of the groups to train on, over all ranks
    rows_to_train     this rank's rows of these groups

Metrics have TRL's names.

Axes: N groups sampled over all ranks, P of them to train on, G episodes per group, K turns, R rows of one rank, T completion
tokens. The position of a group is its number in the order in which prompts were drawn. Ranks take the prompts of a draw in turns,
so position p is group p // ranks of rank p % ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hybrid_lightning.advantages import AdvantageEstimator
from hybrid_lightning.episodes.episodes import token_advantages
from hybrid_lightning.rollout.batching import join_batches, join_rollouts
from hybrid_lightning.rollout.dynamic_sampling import DynamicSampling, choose_groups, share_groups
from hybrid_lightning.rollout.loader import DrawPrompts
from hybrid_lightning.sharding.ranks import gather_columns, gather_objects, own_rows, world_size
from hybrid_lightning.types import PolicyBatch, Prompt, Rewards, Rollout, Sequences, counted_groups, equal_groups

# First parts of the names of rollout metrics: here and by `Generation.metrics`.
_OF_REWARDS = {"accuracy", "frac_reward_zero_std", "reward", "reward_std", "rewards", "solve_rate"}
ROLLOUT_METRICS = frozenset({*_OF_REWARDS, "completions", "episodes", "judge", "num_tokens", "sampling", "sets"})


def sample_groups(
    rule: DynamicSampling,
    first: Rollout,
    draw_more: DrawPrompts | None,
    sample: Callable[[Sequence[Prompt]], Rollout],
    is_useful: Callable[[Rollout], Tensor],
) -> Rollout:
    """Sample until P groups are useful, or until the limit of extra rollouts. All ranks must call this.

    Args:
        rule: Decides how many more prompts to draw.
        first: This rank's P / ranks groups of the first draw, scored.
        draw_more: Draws prompts; None if only the first groups may be used.
        sample: Completes and scores prompts.
        is_useful: Which groups of a rollout give a learning signal, one bool per group.

    Returns:
        All of this rank's groups, with `useful` and these metrics: `sampling/extra_rollouts`; as shares of the sampled groups,
        `sampling/kept_groups` (useful and trained on) and `sampling/surplus_groups` (useful but not needed); as a share of the
        trained groups, `sampling/filled_groups` (not useful).
    """
    ranks, wanted = world_size(), len(first.prompts) * world_size()
    parts = [replace(first, useful=is_useful(first))]
    while True:
        whole = join_rollouts(parts)
        useful = _by_position(whole.useful)
        found, sampled, extra = int(useful.sum()), len(useful), len(parts) - 1
        # The count is the same on every rank, since it depends on the groups of all ranks.
        count = 0 if draw_more is None else rule.prompts_to_add(found, sampled, wanted, extra, ranks)
        if draw_more is None or not count:
            break
        more = sample(draw_more(count))
        parts.append(replace(more, useful=is_useful(more)))
    kept = min(found, wanted)
    metrics = {
        "sampling/extra_rollouts": float(extra),
        "sampling/kept_groups": kept / sampled,
        "sampling/surplus_groups": (found - kept) / sampled,
        "sampling/filled_groups": 1 - kept / wanted,
    }
    return replace(whole, metrics=metrics)


def unfilled(metrics: dict[str, float]) -> str:
    """Message for groups that are trained on without a learning signal, by the metrics of a rollout; "" if there are none."""
    filled = metrics.get("sampling/filled_groups")
    if not filled or not metrics["sampling/extra_rollouts"]:
        return ""
    return (
        f"nothing is learned from {filled:.0%} of a rollout's groups, even after {metrics['sampling/extra_rollouts']:.0f} extra "
        "rollouts: the prompts are too easy or too hard for the policy; give other data, or raise model.samples_per_prompt or "
        "model.dynamic_sampling.max_extra_rollouts (later rollouts only log this as sampling/filled_groups)"
    )


def with_advantages(rollout: Rollout, credited: Rewards, estimator: AdvantageEstimator, wanted: int) -> Rollout:
    """The rollout with advantages, estimated over all ranks. All ranks must call this.

    Args:
        rollout: This rank's groups, as many as on other ranks.
        credited: Their rewards, [P, G], or by turn [P, G, K].
        estimator: Estimates advantages from the rewards of the `wanted` groups to train on.
        wanted: Number of these groups over all ranks. With dynamic sampling more may have been sampled; the advantages of the
            others are 0, as are those of groups that only fill up the rollout, even if their rewards differ (by a penalty).
    """
    rewards = gather_rewards(credited)
    place: Tensor | slice = slice(None)
    if rollout.useful is not None:
        chosen, ranks = _chosen(rollout.useful, wanted), world_size()
        place = chosen % ranks * len(rollout.prompts) + chosen // ranks
    found = estimator.of_rewards(rewards.select(place))
    advantages = found.new_zeros(rewards.total.shape)
    advantages[place] = found
    advantages = own_rows(advantages)
    if rollout.useful is not None:
        advantages = advantages.where(rollout.useful.view(-1, *[1] * (advantages.dim() - 1)), 0.0)
    rollout = replace(rollout, advantages=advantages)
    return replace(rollout, token_advantages=token_advantages(rollout))


def policy_batch(rollout: Rollout, sequences: Sequences, seen: Sequences | None = None) -> PolicyBatch:
    """All rows of a rollout with advantages, as rows to train on.

    Args:
        rollout: The rollout.
        sequences: Its rows as the loss sees them.
        seen: Its rows as the teacher sees them; None: as the policy does.
    """
    assert rollout.advantages is not None, "estimated before"
    advantages = rollout.of_rows(rollout.advantages) if rollout.token_advantages is None else rollout.token_advantages
    return PolicyBatch(
        sequences,
        advantages,
        rollout.sampling_logprobs,
        rollout=rollout,
        seen_by_teacher=seen,
        episode_of_row=rollout.episode_of_row,
        row_weights=_row_weights(rollout, sequences),
    )


def rows_to_train(
    rollout: Rollout, sequences: Sequences, wanted: int, minibatches: int, rank: int, seen: Sequences | None = None
) -> PolicyBatch:
    """This rank's rows of the groups to train on, the same number of groups on each rank. All ranks must call this.

    Args:
        rollout: This rank's groups, with advantages.
        sequences: See `policy_batch`.
        wanted: Number of groups to train on over all ranks. With dynamic sampling, they come from the ranks that sampled them.
        minibatches: Number of minibatches that these groups are split into.
        rank: Number of this rank.
        seen: See `policy_batch`.
    """
    batch = policy_batch(rollout, sequences, seen)
    if rollout.useful is None:
        return batch
    own = replace(batch, rollout=None)
    return replace(
        _exchange(own, _chosen(rollout.useful, wanted).tolist(), minibatches, rank, rollout.group_size), rollout=rollout
    )


def _row_weights(rollout: Rollout, sequences: Sequences) -> Tensor:
    """The share of each row in the sampled tokens of its episode, [R] float32; 0 if the episode does not count.

    Rows of an episode without such tokens, because it was cut, have equal shares: it counts as a sequence.
    """
    tokens = sequences.sampled_mask.sum(dim=1)
    totals, rows = (rollout.of_rows(rollout.sum_rows(values)) for values in (tokens, torch.ones_like(tokens)))
    weights = torch.where(totals > 0, tokens / totals.clamp(min=1), 1 / rows)
    return weights if rollout.scored.counted is None else weights * rollout.of_rows(rollout.scored.counted)


def gather_rewards(rewards: Rewards) -> Rewards:
    """The rewards of all ranks' completions, rank by rank. All ranks must call this with equal numbers."""
    parts = {f"parts/{name}": part for name, part in rewards.parts.items()}
    fields = {"total": rewards.total, "correct": rewards.correct, "counted": rewards.counted}
    columns = gather_columns({name: value for name, value in {**fields, **parts}.items() if value is not None})
    gathered = {name: columns.get(name) for name in fields}
    return replace(rewards, **gathered, parts={name: columns[f"parts/{name}"] for name in rewards.parts})  # type: ignore[arg-type]


def rollout_metrics(rollout: Rollout, credited: Rewards | None = None) -> dict[str, float]:
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
    rewards = rollout.scored
    credited = rewards if credited is None else credited
    equal = equal_groups(credited.total, credited.counted).view(len(rollout.prompts), -1).all(dim=1)
    sequences = rollout.sequences
    columns = gather_columns(
        {
            "equal": equal[:, None].expand(rewards.total.shape),
            "total": rewards.total,
            "correct": rewards.correct,
            "length": rollout.lengths,
            "completion_tokens": rollout.sum_rows(sequences.completion_mask.sum(dim=1)),
            "prompt_tokens": rollout.sum_rows(sequences.prompt_mask.sum(dim=1)),
            "finished": rollout.finished,
            **{f"rewards/{name}": part for name, part in rewards.parts.items()},
            **({} if rewards.counted is None else {"counted": rewards.counted}),
        }
    )
    counted, tokens = columns.get("counted"), columns["completion_tokens"].float().sum() + columns["prompt_tokens"].sum()
    rows_of_groups = counted_groups(columns["total"], counted)
    if not rows_of_groups:
        return {"num_tokens": float(tokens)}
    columns = {name: column.flatten() for name, column in columns.items()}
    groups = [columns["total"][rows] for rows in rows_of_groups]
    std = torch.cat([group.std(dim=1) if group.shape[1] > 1 else torch.zeros_like(group[:, 0]) for group in groups])
    all_equal = torch.cat([columns["equal"][rows[:, 0]] for rows in rows_of_groups])
    solved = torch.cat([columns["correct"][rows].float().mean(dim=1) for rows in rows_of_groups])
    counted = columns.get("counted")
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
    for name, rows in _rows_of_sets(rollout, lengths.device).items():
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


def _exchange(batch: PolicyBatch, chosen: list[int], minibatches: int, rank: int, samples: int) -> PolicyBatch:
    """This rank's share of the chosen groups, from `batch` with the rows of all groups that this rank sampled."""
    ranks = world_size()
    shares = share_groups([number % ranks for number in chosen], ranks, minibatches)

    def group(number: int) -> PolicyBatch:
        of_group = batch.episode_of_row.div(samples, rounding_mode="floor") == chosen[number] // ranks
        return batch.rows(of_group.nonzero().flatten())

    moved = [number for other, share in enumerate(shares) for number in share if chosen[number] % ranks != other]
    fetched: dict[int, PolicyBatch] = {}
    if moved:  # the same on all ranks
        for of_rank in gather_objects({n: group(n).to("cpu") for n in moved if chosen[n] % ranks == rank}):
            fetched |= of_rank
    device = batch.advantages.device
    return join_batches([fetched[number].to(device) if number in fetched else group(number) for number in shares[rank]])


def _rows_of_sets(rollout: Rollout, device: torch.device) -> dict[str, Tensor]:
    """Name of a set -> [all ranks' B] bool, its sequences; empty if the data is one set without a name."""
    if not rollout.prompts[0].set_name:
        return {}
    names = [name for rank in gather_objects([prompt.set_name for prompt in rollout.prompts]) for name in rank]
    of_sequence = [name for name in names for _ in range(rollout.group_size)]
    return {name: torch.tensor([other == name for other in of_sequence], device=device) for name in dict.fromkeys(names)}


def _chosen(useful: Tensor, wanted: int) -> Tensor:
    """Positions of the groups to train on, [P] ascending, from `useful` of this rank's groups."""
    return choose_groups(_by_position(useful), wanted)


def _by_position(own: Tensor | None) -> Tensor:
    """Values of all ranks' groups by position, [N], from the values of this rank's groups."""
    assert own is not None
    return gather_columns({"": own})[""].view(world_size(), -1).T.flatten()
