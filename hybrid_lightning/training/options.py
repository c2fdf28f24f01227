"""What the modules hand their tasks: `TaskParts` for any kind of training, and `RLOptions` for reinforcement learning."""

from dataclasses import dataclass, field
from typing import Literal

from hybrid_lightning.advantages import AdvantageEstimator, GroupAdvantage, NoAdvantage
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import Distillation, ImportanceCorrection, TopEntropyMask
from hybrid_lightning.model.policy import Policy
from hybrid_lightning.rollout.dynamic_sampling import DynamicSampling
from hybrid_lightning.rollout.rollout_engine import RolloutEngine
from hybrid_lightning.training.run import Run
from hybrid_lightning.training.teachers import Teacher


@dataclass(frozen=True)
class TaskParts:
    """What `LanguageModule` makes of its options for the task of a subclass."""

    policy: Policy
    run: Run
    sampler: RolloutEngine  # makes completions, of evaluations too
    eval_samples: int  # sampled completions per prompt in an evaluation
    max_tokens: int | None  # most tokens in a pass; None for an automatic choice
    seed: int  # of the order of the data, of sampling and of evaluation


@dataclass(frozen=True)
class RLOptions:
    """How `RLTask` turns rewards into a loss. `PolicyModule` describes each option.

    Raises:
        ConfigError: If a value is invalid, or options do not work together.
    """

    advantage: AdvantageEstimator = field(default_factory=GroupAdvantage)
    credit: Literal["episode", "turn"] = "episode"  # the reward that determines the advantage of a token
    correction: ImportanceCorrection | None = None  # weighs the policy term by sampling's and training's probabilities
    token_mask: TopEntropyMask | None = None  # the tokens in the policy term; None for all
    mask_truncated_completions: bool = False  # whether the loss leaves out completions that a token limit cut
    dynamic_sampling: DynamicSampling | None = None  # replaces groups without a learning signal
    teacher: Teacher | None = None  # a better policy that rates the sampled tokens
    distillation: Distillation | None = None  # how to learn from the teacher; None for `SampledReverseKL()`

    def __post_init__(self) -> None:
        if self.credit not in ("episode", "turn"):
            raise ConfigError(f"model.credit={self.credit!r}; give episode or turn")
        if self.teacher is None and (self.distillation is not None or isinstance(self.advantage, NoAdvantage)):
            given = type(self.distillation or self.advantage).__name__
            raise ConfigError(f"{given} needs a teacher; set model.teacher, such as ModelTeacher")
        if self.teacher is not None and self.dynamic_sampling is not None:
            raise ConfigError("model.teacher also teaches on prompts that model.dynamic_sampling would replace; leave one out")
