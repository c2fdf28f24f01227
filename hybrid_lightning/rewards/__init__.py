"""Verifiable rewards: what a completion earns."""

from hybrid_lightning.rewards.base import RewardFunction
from hybrid_lightning.rewards.by_set import RewardBySet
from hybrid_lightning.rewards.code_tests import CodeTests
from hybrid_lightning.rewards.cosine_length import CosineLength
from hybrid_lightning.rewards.evaluate import evaluate_reward, extract_answers
from hybrid_lightning.rewards.exact_match import ExactMatch
from hybrid_lightning.rewards.format_reward import FormatReward
from hybrid_lightning.rewards.function import FunctionReward
from hybrid_lightning.rewards.group_length import GroupLength
from hybrid_lightning.rewards.math_match import MathMatch
from hybrid_lightning.rewards.multiple_choice import MultipleChoice
from hybrid_lightning.rewards.overlong import OverlongPenalty
from hybrid_lightning.rewards.reasoning_gym import ReasoningGymReward
from hybrid_lightning.rewards.repetition import RepetitionPenalty
from hybrid_lightning.rewards.weighted_sum import WeightedSum

__all__ = [
    "CodeTests",
    "CosineLength",
    "ExactMatch",
    "FormatReward",
    "FunctionReward",
    "GroupLength",
    "MathMatch",
    "MultipleChoice",
    "OverlongPenalty",
    "ReasoningGymReward",
    "RepetitionPenalty",
    "RewardBySet",
    "RewardFunction",
    "WeightedSum",
    "evaluate_reward",
    "extract_answers",
]
