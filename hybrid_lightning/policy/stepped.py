"""`SteppedModule`: a policy whose optimizer step is the sum of what its micro-batches, and runs of their rows, add to the loss.

Lightning asks for the loss of one micro-batch at a time (`accumulate_grad_batches` of them make an optimizer step). Its rows may
be more tokens than memory holds activations for, so `training_step` cuts them into runs of at most
`max_tokens_per_micro_batch` tokens. All but the last run go backward at once; the loss of the last is returned to Lightning.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loops.progress import _ProcessedTracker
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel

from hybrid_lightning.engine import default_token_budget
from hybrid_lightning.errors import TrainingError
from hybrid_lightning.losses.shares import combine_metrics
from hybrid_lightning.policy.evaluated import EvaluatedModule
from hybrid_lightning.policy.step_metrics import StepMetrics, join_ranks
from hybrid_lightning.policy.step_times import PhaseClock
from hybrid_lightning.rollout.batching import join_rows, split_by_tokens
from hybrid_lightning.rollout.loader import RolloutLoader, RolloutSchedule, RolloutSource
from hybrid_lightning.sharding.norms import total_norm
from hybrid_lightning.sharding.ranks import gather_counts, gather_objects, sum_over_ranks
from hybrid_lightning.types import PolicyBatch, Prompt, Sequences

# First parts of the names of all that training logs, by modules, losses and callbacks of ours.
TRAINING_METRICS = frozenset(
    {
        "accuracy",
        "cispo_clip_ratio",
        "clip_ratio",
        "completions",
        "entropy",
        "epoch",
        "frac_reward_zero_std",
        "grad_norm",
        "kl",
        "logps",
        "loss",
        "num_tokens",
        "ratio",
        "reward",
        "reward_std",
        "rewards",
        "sampling",
        "sets",
        "solve_rate",
        "step",
        "throughput",
        "top_entropy",
        "time",
    }
)


class SteppedModule(EvaluatedModule, ABC):
    """The training hooks; a subclass is a `RolloutSource`, gives `logprobs` and `_run`, and sets the attributes."""

    rollout_schedule: RolloutSchedule
    clock: PhaseClock
    shown_metrics: tuple[str, ...] = ("reward", "completions/mean_length")  # beside the progress bar
    rows_together = 1  # so many neighbouring rows are never cut apart: the pairs of a preference loss

    def __init__(self) -> None:
        super().__init__()
        self._step_metrics = StepMetrics()
        self._gradients_begun = False
        self._default_budget: int | None = None
        self._measured: set[str] = set()  # metrics of the step that was logged last
        self._logged_rollout: dict[str, float] = {}  # metrics of the rollout that were logged last

    def rollout_loader(self, prompts: Sequence[Prompt]) -> RolloutLoader:
        """The train dataloader: rollouts of these prompts. A data module's `train_dataloader` returns it."""
        trainer = self.trainer
        epoch = trainer.current_epoch
        generator = torch.Generator(device=self.device).manual_seed(self.seed * 100_003 + 1_000_000_007 * epoch)
        return RolloutLoader(
            prompts,
            cast(RolloutSource, self),
            self.rollout_schedule,
            accumulate_grad_batches=lambda: trainer.accumulate_grad_batches,
            generator=generator,
            seed=self.seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            sum_over_ranks=sum_over_ranks,
            gather_over_ranks=gather_objects,
            epoch=epoch,
            shuffle=trainer.overfit_batches == 0,  # type: ignore[attr-defined]
            on_other_prompts=lambda: begin_epoch_anew(trainer),
        )

    def check_enough(self, prompts: Sequence[Prompt]) -> None:
        """Raise ConfigError if these training prompts are fewer than one rollout takes."""
        self.rollout_schedule.check_prompts(len(prompts))

    def on_train_start(self) -> None:
        """Let the loader go on where the checkpoint was.

        Lightning does so as it asks for the loader: too early, where a schedule has asked how many steps `max_epochs` are.
        """
        self.trainer.fit_loop._load_combined_loader_states()

    @abstractmethod
    def logprobs(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Log-probabilities with gradient and entropies of completions, [B, T] each."""

    @abstractmethod
    def _run(self, batch: PolicyBatch, micro_batch_tokens: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a run of rows of a micro-batch, all of them shares in the optimizer step's.

        Args:
            batch: The rows.
            micro_batch_tokens: Completion tokens of the whole micro-batch.
        """

    def _runs(self, sequences: Sequences) -> list[slice]:
        return split_by_tokens(sequences, self._token_budget(), self.rows_together)

    def _constant_logprobs(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """What `logprobs` gives, in the same runs of rows in which they are trained, so that the same numbers come out."""
        runs = self._runs(sequences)
        width = sequences.completion_ids.shape[1]
        logprobs, entropies = zip(*(self.logprobs(sequences.rows(run)) for run in runs), strict=True)
        return join_rows(logprobs, width), join_rows(entropies, width)

    def _token_budget(self) -> int:
        if self.max_tokens_per_micro_batch:
            return self.max_tokens_per_micro_batch
        if self._default_budget is None:  # asking the model takes as long as a small policy's layer
            self._default_budget = default_token_budget(self.model, self.device)
        return self._default_budget

    def on_train_epoch_start(self) -> None:
        """An epoch begins with an optimizer step, also after one that was cut short within a step."""
        self._step_metrics = StepMetrics()
        self._default_budget = None
        self._measured, self._logged_rollout = set(), {}
        self._gradients_begun = False

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """The update begins, after all callbacks' hooks of this name; `StepTimer` sees its end before any other callback."""
        self.clock.switch("update")

    def training_step(self, batch: PolicyBatch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch."""
        ranks = self.trainer.world_size
        runs = self._runs(batch.sequences)
        runs_of_ranks = gather_counts(len(runs), self.device)
        # Where the model is sharded, a forward and a backward pass are made by all ranks together.
        passes = max(1, *runs_of_ranks) if self.weights.sharded else len(runs)
        if passes > 1:
            self._begin_gradients(batch_idx)
        tokens = float(batch.sequences.completion_mask.sum())
        losses, metrics = [], []
        for number in range(passes):
            last = number + 1 == passes
            if self.weights.sharded or last:
                self.check_stop()  # before ranks wait for each other
            elif self.signals.requested:
                continue
            # Torn apart, a pass would leave other ranks waiting for this one.
            with self.signals.at_once() if ranks == 1 else nullcontext():
                if number < len(runs):
                    loss, of_run = self._run(batch.rows(runs[number]), tokens)
                    losses.append(loss.detach())
                    metrics.append(of_run)
                else:
                    loss = self._idle_run()
                if not last:
                    self._backward(loss * ranks)
        if not passes:  # no row has an advantage: the gradient is zero, not missing, or optimizers would skip their decay
            self.check_stop()
            loss = sum(((parameter * 0).sum() for parameter in self._trained()), start=torch.zeros((), device=self.device))
        total = torch.stack(losses).sum() if losses else loss.detach()
        loss = loss + (total - loss.detach())  # the value of all runs, for callbacks; the gradient of the last
        self._log_step(batch, join_ranks({"loss": total, **combine_metrics(metrics)}, runs_of_ranks))
        # Lightning divides by the accumulated micro-batches and DDP/FSDP average over ranks; the loss is a share of a sum.
        return loss * (self.trainer.accumulate_grad_batches * ranks)

    def _idle_run(self) -> Tensor:
        """A loss of zero with a gradient of zero, from a forward pass as short as can be, for a rank with nothing to compute."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        real = torch.ones_like(token, dtype=torch.bool)
        return self.logprobs(Sequences(token, real, token, real))[0].sum() * 0

    def _trained(self) -> list[Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _begin_gradients(self, batch_idx: int) -> None:
        """Clear old gradients at the first micro-batch of an optimizer step.

        Lightning would clear them after `training_step` and before the backward pass, when the first runs' gradients are there.
        """
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.optimizers(use_pl_optimizer=False).zero_grad()  # type: ignore[union-attr]
            self._gradients_begun = True

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Clear old gradients, unless `training_step` has done so (see `_begin_gradients`)."""
        if not self._gradients_begun:
            optimizer.zero_grad()
        self._gradients_begun = False

    def _backward(self, loss: Tensor) -> None:
        """The backward pass that Lightning runs, now; outside of autocast, and with nothing kept of what it has cast."""
        with torch.autocast(loss.device.type, enabled=False):
            self.trainer.strategy.backward(loss, None)
        torch.clear_autocast_cache()

    def _log_step(self, batch: PolicyBatch, shares: Mapping[str, Tensor]) -> None:
        """Log what is the same on every rank: metrics of rollouts and shares have been joined over ranks."""
        averages = self._step_metrics.update(shares=dict(shares), means={}, micro_batches=self.trainer.accumulate_grad_batches)
        self._forget_metrics(self._measured - averages.keys())
        self._measured = set(averages)
        # Lightning keeps what was logged until the epoch ends, and each call takes it as long as a small policy's layer: what is
        # said of a rollout is said once.
        of_rollout = {} if batch.metrics == self._logged_rollout else batch.metrics
        self._logged_rollout = batch.metrics
        values: dict[str, Any] = {**of_rollout, **averages}
        shown = {name: values[name] for name in self.shown_metrics if name in values}
        options: dict[str, Any] = {
            "on_step": True,
            "on_epoch": False,
            "batch_size": max(1, len(batch.sequences)),
        }
        self.log_dict(shown, prog_bar=True, **options)
        self.log_dict({name: value for name, value in values.items() if name not in shown}, **options)

    def _forget_metrics(self, names: Iterable[str]) -> None:
        """Let Lightning repeat nothing of an earlier step, where a step without a row to compute has no such value."""
        results: Any = self.trainer._results
        for name in names:
            results.pop(f"training_step.{name}", None)
            self.trainer._logger_connector._callback_metrics.pop(name, None)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient norm of each group before clipping.

        Raises:
            TrainingError: If one is not finite: a step by it would make all weights nan. The scaler of float16 leaves such a
                step out and tries a smaller scale.
        """
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        for group in optimizer.param_groups:
            gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            norm = total_norm(gradients, self.device, local_parts=isinstance(self.model, FullyShardedDataParallel))
            self.log(f"grad_norm/{group['name']}", norm, on_step=True, on_epoch=False)
            if not scaled and not torch.isfinite(norm):
                raise TrainingError(
                    f"the gradient of step {self.trainer.global_step + 1} is {float(norm)} (grad_norm/{group['name']}), "
                    "so no step was made. Look at a loss of your own, or lower model.lr_full and model.lr_lora and go on from an "
                    "earlier checkpoint"
                )


def begin_epoch_anew(trainer: Trainer) -> None:
    """Count the micro-batches of an epoch from its first, when a resumed run has another number of them in it.

    Else the epoch would end, or an optimizer step be made, after a part of a step's micro-batches. Counts over all epochs stay.
    Called between `setup_data` and the first micro-batch.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    total, current = cast(_ProcessedTracker, progress.total), cast(_ProcessedTracker, progress.current)
    count = int(trainer.num_training_batches) if progress.is_last_batch else 0  # an epoch that is over stays so
    current.ready = current.started = current.processed = count
    # A checkpoint that is saved within a micro-batch's last hook does not count it as completed; Lightning then adds it.
    current.completed = count - (total.processed - total.completed)
