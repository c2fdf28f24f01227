"""What the parts of a policy ask of it: evaluation, calibration and the update each name the few things they need.

`LanguageModule` and its subclasses offer all of it, so that these parts can be read, and tested, without them.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hybrid_lightning.rollout.loader import RolloutSchedule, RolloutSource
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.sharding.weights import Weights
from hybrid_lightning.stopping import StopSignals
from hybrid_lightning.types import PolicyBatch, Prompt, Rewards, Rollouts, Sequences


class CompletingPolicy(Protocol):
    """Completes prompts and is rewarded for it."""

    seed: int

    def generate(
        self, prompts: Sequence[Prompt], samples_per_prompt: int, generator: PromptDraws | None = None, greedy: bool = False
    ) -> Rollouts:
        """Complete P prompts, each `samples_per_prompt` times."""
        ...

    def score(self, rollouts: Rollouts) -> Rewards:
        """Rewards of the completions."""
        ...


class EvaluatedPolicy(CompletingPolicy, Protocol):
    """Is evaluated on held-out prompts (see `evaluation.py`)."""

    eval_samples: int  # sampled completions of each prompt
    trainer: Any

    def answers(self, rollouts: Rollouts) -> list[str | None]:
        """The answer in each completion, None where there is none."""
        ...

    def log_dict(self, dictionary: dict[str, Any], *, sync_dist: bool) -> None:
        """Log values, as `LightningModule.log_dict` does."""
        ...


class CalibratedPolicy(CompletingPolicy, Protocol):
    """Makes the calibration rollouts by which its modules are scored (see `calibration.py`)."""

    generation: Any  # `Generation`, which gives a rollout engine its weights
    rollout_schedule: RolloutSchedule
    signals: StopSignals
    weights: Weights  # of the model, perhaps sharded

    @property
    def model(self) -> nn.Module:
        """The language model."""
        ...

    @property
    def model_device(self) -> torch.device:
        """Where the model computes."""
        ...

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt."""
        ...


class TrainedPolicy(RolloutSource, Protocol):
    """Is trained by optimizer steps (see `update.py`) on the rollouts that it makes itself."""

    max_tokens_per_micro_batch: int | None  # tokens that one forward and backward pass takes; None: chosen by the model's sizes
    tokens_of_pass: int | None  # what was chosen for the run; None: nothing yet
    rollout_schedule: RolloutSchedule
    rows_together: int  # so many neighbouring rows are never in different passes
    seed: int
    shown_metrics: tuple[str, ...]  # beside the progress bar
    signals: StopSignals
    trainer: Any
    weights: Weights  # of the model, perhaps sharded

    @property
    def model(self) -> nn.Module:
        """The language model with its adapter."""
        ...

    @property
    def device(self) -> torch.device:
        """The device that trains."""
        ...

    def logprobs(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Log-probabilities with gradient and entropies of completions, [B, T] each."""
        ...

    def chunk_loss(self, chunk: PolicyBatch, micro_batch_tokens: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a chunk of a micro-batch, as shares in those of the optimizer step.

        Args:
            chunk: Some rows of the micro-batch.
            micro_batch_tokens: Completion tokens of the whole micro-batch, over which some losses average.
        """
        ...

    def check_stop(self) -> None:
        """Raise `RunStopped` on all ranks if one of them has been asked to stop. All ranks have to call it."""
        ...

    def optimizers(self, *, use_pl_optimizer: bool) -> Any:
        """The optimizer, as `LightningModule.optimizers` gives it."""
        ...

    def log(self, name: str, value: Tensor, *, on_step: bool, on_epoch: bool) -> None:
        """Log a value, as `LightningModule.log` does."""
        ...

    def log_dict(
        self, dictionary: dict[str, Any], prog_bar: bool = False, *, on_step: bool, on_epoch: bool, batch_size: int
    ) -> None:
        """Log values, as `LightningModule.log_dict` does."""
        ...
