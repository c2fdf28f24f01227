"""`Task`: a kind of training, without Lightning: on a policy's own rollouts (`loop.py`), or on examples (`example_task.py`).

The parts of an optimizer step; a subclass implements the methods marked with * (see `RolloutSource` for the first three):

    RolloutLoader                    the train dataloader
      begin *, finish *              completions of a batch of prompts, their advantages, and the rows of each optimizer step
      add_logprobs *                 log-probabilities of the policy before the rollout's first step, and of the start policy
    OptimizerStep                    splits a micro-batch into chunks that fit into memory
      chunk_loss *                   loss of a chunk

`module.py` calls these from Lightning's hooks.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import ExampleLoss, PolicyLoss
from hybrid_lightning.metrics import check_set_name
from hybrid_lightning.model.passes import Passes
from hybrid_lightning.rollout.batching import minibatch
from hybrid_lightning.rollout.loader import RolloutLoader, RolloutSchedule, RolloutSource
from hybrid_lightning.runner import base_model
from hybrid_lightning.shared.user_code import in_user_code
from hybrid_lightning.training.calibration import CalibrationLosses
from hybrid_lightning.training.evaluation import Evaluation
from hybrid_lightning.training.generation import Generation
from hybrid_lightning.training.run_checks import warn_if_lost, warn_of_differences
from hybrid_lightning.training.step import OptimizerStep
from hybrid_lightning.types import PolicyBatch, Prompt, Sequences


class Task(RolloutSource, ABC):
    """A kind of training: its data, loss and steps.

    Args:
        loss: The loss.
        schedule: Sizes of rollouts and minibatches.
        generation: Completes and scores prompts: of training, calibration and evaluation.
        passes: Log-probabilities of rows.
        evaluation: Measures the policy on held-out prompts.
        seed: Seed of the order of the data and of sampling.
    """

    # First parts of training's metric names ("completions" of "completions/mean_length"), with Lightning's and `StepTimer`'s.
    training_metrics = frozenset({"loss", "grad_norm", "epoch", "step", "time", "throughput"})
    shown_metrics: tuple[str, ...] = ()  # beside the progress bar

    def __init__(
        self,
        loss: PolicyLoss | ExampleLoss,
        schedule: RolloutSchedule,
        generation: Generation,
        passes: Passes,
        evaluation: Evaluation,
        seed: int,
    ) -> None:
        self.loss, self.schedule, self.generation, self.passes = loss, schedule, generation, passes
        self.evaluation, self.seed = evaluation, seed
        self.needs_start_policy = loss.needs_reference  # whether training needs the start policy's weights
        self.policy, self.run, self.reward = generation.policy, generation.run, generation.reward

    # ---- training

    @abstractmethod
    def chunk_loss(self, chunk: PolicyBatch, micro_batch_tokens: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a chunk of a micro-batch, as shares of the optimizer step's loss and metrics.

        Some losses average over `micro_batch_tokens`, the completion tokens of the whole micro-batch.
        """

    def minibatches(self, batch: PolicyBatch, number: int) -> list[PolicyBatch]:
        """The optimizer steps of one pass over a rollout, from this rank's rows of all of them."""
        samples, total = self.schedule.samples_per_prompt, self.run.sum_over_ranks
        parts = batch.split(self.schedule.minibatches_per_rollout)
        return [minibatch(part, number, self.needs_all_rows, samples, total) for part in parts]

    @contextmanager
    def phase(self, name: str, on_failure: Callable[[], object] = lambda: None) -> Iterator[None]:
        """A phase of a rollout. After the phase, all ranks stop if one of them must stop."""
        try:
            with self.run.stopping_together(), self.run.clock.phase(name):
                yield
        except BaseException:
            on_failure()
            raise

    def prepare_passes(self) -> None:
        """Test which fast passes a freshly split model supports. Done now, since all ranks must take these passes together."""
        policy = self.policy
        with policy.inference():
            policy.weights.as_forward(policy.runner.prepare)

    def new_step(self) -> OptimizerStep:
        """A new `OptimizerStep` for an epoch, which takes one optimizer step after another."""
        return OptimizerStep(self.run, self.passes, self.chunk_loss, self.shown_metrics)

    def loader(self, prompts: Sequence[Prompt], epoch: int = 0, shuffle: bool = True) -> RolloutLoader:
        """The train dataloader: rollouts of these prompts from this epoch on, reshuffled in each epoch or always in order."""
        self.check_enough(prompts)
        generator = torch.Generator().manual_seed(self.seed * 100_003 + 1_000_000_007 * epoch)
        options: dict[str, Any] = {"generator": generator, "seed": self.seed, "epoch": epoch, "shuffle": shuffle}
        return RolloutLoader(prompts, self, self.schedule, self.run, **options)

    # ---- scoring of modules

    @abstractmethod
    def calibration_losses(self, prompts: Sequence[Prompt], count: int | None = None) -> CalibrationLosses:
        """Losses of the start policy on `count` of these prompts; their mean gradient scores the modules.

        `count=None` uses the number in one optimizer step or rollout.

        Raises:
            ConfigError: If there are too few prompts.
            CalibrationError: If the prompts give no learning signal.
        """

    @property
    def calibration_seed(self) -> int:
        """Seed of the order and the completions of calibration prompts, different from training's seed."""
        return self.seed + 7919

    def calibration_logprobs(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Log-probabilities with gradient and entropies, [B, T] each, in the run's precision, outside a training step."""
        with self.policy.precision():
            return self.passes.logprobs(sequences)

    # ---- checks, before time is spent on a run

    def check_run(self) -> None:
        """Raise ConfigError if the run's settings do not work for policy, engine or task; warn of doubtful settings."""
        policy = self.policy
        self.generation.check()
        if policy.plan is not None:
            self.check_start_weights(policy.keep_start_weights)
        if policy.is_loaded:  # before that the attention is not known
            attention = getattr(base_model(policy.model).config, "_attn_implementation", None)
            warn_of_differences(self.run, attention, self.generation.reward_terms())
            if self.run.stage == "fit" and self.reward is not None:
                warn_if_lost(self.reward)
        self.check()

    @abstractmethod
    def check(self) -> None:
        """Raise ConfigError if the run's settings do not work for this task; warn of doubtful settings."""

    def check_start_weights(self, kept: bool) -> None:
        """Raise ConfigError if training needs the start policy and its weights are not kept."""
        if self.needs_start_policy and not kept:
            raise ConfigError(
                "the run needs the start policy (a KL term with kl_coef > 0, DPO, or SelfTeacher); set "
                "adapter.keep_start_weights=true"
            )

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Check that completions of these prompts can be scored (see `RewardFunction.check_prompt`) and reported on."""
        for name in {prompt.set_name for prompt in prompts}:
            check_set_name(name)
        for reward in self.generation.reward_terms():
            with in_user_code(reward, "check_prompt"):
                for prompt in prompts:
                    reward.check_prompt(prompt)

    def check_training_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise ConfigError if these training prompts are too few or too long."""
        self.check_enough(prompts)
        self.generation.check_encoding(prompts)

    def check_enough(self, prompts: Sequence[Prompt]) -> None:
        """Raise ConfigError if there are fewer training prompts than one rollout needs."""
        self.schedule.check_prompts(len(prompts))
