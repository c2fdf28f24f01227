"""Advantages of a rollout whose prompts lie on several ranks."""

from dataclasses import replace

from torch import Tensor

from hybrid_lightning.advantages import AdvantageEstimator
from hybrid_lightning.sharding.ranks import gather_columns, own_rows
from hybrid_lightning.types import Rewards


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
