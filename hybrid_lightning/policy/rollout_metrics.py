"""Metrics of a rollout, under the names that users of TRL know.

Axes: P prompts, G samples per prompt, B = P * G sequences in prompt-major order.
"""

import torch
from torch import Tensor

from hybrid_lightning.sharding.ranks import gather_columns, gather_objects
from hybrid_lightning.types import Rewards, Rollouts

# First parts of the names of what is measured on a rollout: here, by `SampledGroups.metrics` and by `Generation.metrics`.
_OF_REWARDS = {"accuracy", "frac_reward_zero_std", "reward", "reward_std", "rewards", "solve_rate"}
ROLLOUT_METRICS = frozenset({*_OF_REWARDS, "completions", "num_tokens", "sampling", "sets"})


def rollout_metrics(rollouts: Rollouts, rewards: Rewards) -> dict[str, float]:
    """Compute the metrics of one rollout over all ranks, which have equally many prompts. All ranks have to call it.

    Args:
        rollouts: This rank's B sequences.
        rewards: Their rewards.

    Returns:
        `reward` (mean over sequences), `reward_std` (mean over groups of the unbiased standard deviation in a group),
        `frac_reward_zero_std` (share of groups whose rewards are all equal, so that nothing is learned from them),
        `rewards/{name}/mean` and `/std`,
        `solve_rate/{all,none,mixed}` (shares of groups of which all, none or some completions are correct), `accuracy`,
        `completions/*` in tokens, `num_tokens`; for each set of a mixture `sets/{name}/{reward,accuracy,mean_length}`.
    """
    sequences = rollouts.sequences
    columns = gather_columns(
        {
            "total": rewards.total,
            "correct": rewards.correct,
            "length": sequences.completion_mask.sum(dim=1),
            "prompt_length": sequences.prompt_mask.sum(dim=1),
            "finished": rollouts.finished,
            **{f"rewards/{name}": part for name, part in rewards.parts.items()},
        }
    )
    groups = columns["total"].view(-1, rollouts.samples_per_prompt)
    std = groups.std(dim=1) if groups.shape[1] > 1 else torch.zeros_like(groups[:, 0])
    all_equal = groups.amax(dim=1) == groups.amin(dim=1)
    solved = columns["correct"].view_as(groups).float().mean(dim=1)
    lengths = columns["length"].float()
    metrics = {
        "reward": columns["total"].mean(),
        "reward_std": std.mean(),
        "frac_reward_zero_std": all_equal.float().mean(),
        "accuracy": columns["correct"].float().mean(),
        "solve_rate/all": (solved == 1).float().mean(),
        "solve_rate/none": (solved == 0).float().mean(),
        "solve_rate/mixed": ((solved > 0) & (solved < 1)).float().mean(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1 - columns["finished"].float().mean(),
        "num_tokens": lengths.sum() + columns["prompt_length"].sum(),
    }
    for name in rewards.parts:
        part = columns[f"rewards/{name}"]
        metrics[f"rewards/{name}/mean"] = part.mean()
        metrics[f"rewards/{name}/std"] = part.std() if len(part) > 1 else torch.zeros(())
    for name, rows in _rows_of_sets(rollouts, groups.device).items():
        metrics[f"sets/{name}/reward"] = columns["total"][rows].mean()
        metrics[f"sets/{name}/accuracy"] = columns["correct"][rows].float().mean()
        metrics[f"sets/{name}/mean_length"] = lengths[rows].mean()
    return {name: float(value) for name, value in metrics.items()}


def _rows_of_sets(rollouts: Rollouts, device: torch.device) -> dict[str, Tensor]:
    """Name of a set -> [all ranks' B] bool, the sequences that belong to it; empty where the data is one set without a name."""
    if not rollouts.prompts[0].set_name:
        return {}
    names = [name for rank in gather_objects([prompt.set_name for prompt in rollouts.prompts]) for name in rank]
    of_sequence = [name for name in names for _ in range(rollouts.samples_per_prompt)]
    return {name: torch.tensor([other == name for other in of_sequence], device=device) for name in dict.fromkeys(names)}
