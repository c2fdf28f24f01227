"""Verifiable rewards: what a completion earns."""

from hybrid_lightning.rewards.base import RewardFunction
from hybrid_lightning.rewards.code_tests import CodeTests
from hybrid_lightning.rewards.evaluate import evaluate_reward, extract_answers
from hybrid_lightning.rewards.exact_match import ExactMatch
from hybrid_lightning.rewards.format_reward import FormatReward
from hybrid_lightning.rewards.math_match import MathMatch
from hybrid_lightning.rewards.overlong import OverlongPenalty
from hybrid_lightning.rewards.reasoning_gym import ReasoningGymReward
from hybrid_lightning.rewards.weighted_sum import WeightedSum

__all__ = [
    "CodeTests",
    "ExactMatch",
    "FormatReward",
    "MathMatch",
    "OverlongPenalty",
    "ReasoningGymReward",
    "RewardFunction",
    "WeightedSum",
    "evaluate_reward",
    "extract_answers",
]
