"""Generation of completions, and rollouts as training data."""

from typing import TYPE_CHECKING

from hybrid_lightning.configurable import public_names

if TYPE_CHECKING:
    from hybrid_lightning.rollout.dynamic_sampling import DynamicSampling
    from hybrid_lightning.rollout.loader import RolloutLoader, RolloutSchedule
    from hybrid_lightning.rollout.rollout_engine import RolloutEngine
    from hybrid_lightning.rollout.sampler import Sampler

__all__ = ["DynamicSampling", "RolloutEngine", "RolloutLoader", "RolloutSchedule", "Sampler"]

__getattr__ = public_names(
    __name__,
    {
        "dynamic_sampling": ["DynamicSampling"],
        "loader": ["RolloutLoader", "RolloutSchedule"],
        "rollout_engine": ["RolloutEngine"],
        "sampler": ["Sampler"],
    },
)
