"""Verifiable rewards: scores of completions, computed by rules, tests and comparisons with a reference answer."""

from hybrid_lightning.rewards.arriving import ArrivingRewards
from hybrid_lightning.rewards.code_tests import CodeTests
from hybrid_lightning.rewards.combined import RewardBySet, WeightedSum
from hybrid_lightning.rewards.episode import EpisodeReturn, FinalAnswer, rewards_to_go
from hybrid_lightning.rewards.evaluate import evaluate_reward, extract_answers
from hybrid_lightning.rewards.function import FunctionReward, TRLReward
from hybrid_lightning.rewards.judge import JudgeReward
from hybrid_lightning.rewards.length import CosineLength, GroupLength, OverlongPenalty
from hybrid_lightning.rewards.mathematics.match import MathMatch
from hybrid_lightning.rewards.multiple_choice import MultipleChoice
from hybrid_lightning.rewards.reasoning_gym_reward import ReasoningGymReward
from hybrid_lightning.rewards.reward_function import RewardFunction
from hybrid_lightning.rewards.text import ExactMatch, FormatReward, RepetitionPenalty

__all__ = [
    "ArrivingRewards",
    "CodeTests",
    "CosineLength",
    "EpisodeReturn",
    "ExactMatch",
    "FinalAnswer",
    "FormatReward",
    "FunctionReward",
    "GroupLength",
    "JudgeReward",
    "MathMatch",
    "MultipleChoice",
    "OverlongPenalty",
    "ReasoningGymReward",
    "RepetitionPenalty",
    "RewardBySet",
    "RewardFunction",
    "TRLReward",
    "WeightedSum",
    "evaluate_reward",
    "extract_answers",
    "rewards_to_go",
]
