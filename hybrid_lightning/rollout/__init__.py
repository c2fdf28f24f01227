"""Generation of completions, and rollouts as training data."""

from typing import TYPE_CHECKING

from hybrid_lightning.configurable import public_names

if TYPE_CHECKING:
    from hybrid_lightning.rollout.dynamic_sampling import DynamicSampling
    from hybrid_lightning.rollout.loader import RolloutLoader, RolloutSchedule
    from hybrid_lightning.rollout.sampler import Sampler

__all__ = ["DynamicSampling", "RolloutLoader", "RolloutSchedule", "Sampler"]

__getattr__ = public_names(
    __name__,
    {
        "dynamic_sampling": ["DynamicSampling"],
        "loader": ["RolloutLoader", "RolloutSchedule"],
        "sampler": ["Sampler"],
    },
)
