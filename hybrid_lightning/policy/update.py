"""`Update`: an optimizer step is the sum of what its micro-batches, and chunks of their rows, add to the loss.

Lightning asks for the loss of one micro-batch at a time (`accumulate_grad_batches` of them make an optimizer step). Its rows may
be more tokens than memory holds activations for, so they are cut into chunks of at most `max_tokens_per_micro_batch` tokens. All
but the last chunk go backward at once; the loss of the last is returned to Lightning.
"""

import math
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
from hybrid_lightning.losses.shares import combine_metrics, is_extreme, join_metric
from hybrid_lightning.rollout.batching import join_rows, split_by_tokens
from hybrid_lightning.rollout.loader import RolloutLoader
from hybrid_lightning.sharding.ranks import gather_counts, gather_objects, largest_over_ranks, sum_over_ranks, total_norm
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


class Update:
    """What is known of an epoch's optimizer step while its micro-batches come, one after the other.

    Its methods are the training hooks of `module`, a `LanguageModule`.
    """

    def __init__(self) -> None:
        self._metrics = StepMetrics()
        self._gradients_begun = False
        self._default_budget: int | None = None
        self._logged: set[str] = set()  # metrics of the step that was logged last
        self._logged_rollout: dict[str, float] = {}  # metrics of the rollout that were logged last

    def token_budget(self, module: Any) -> int:
        """Tokens that one forward and backward pass takes."""
        if module.max_tokens_per_micro_batch:
            return int(module.max_tokens_per_micro_batch)
        if self._default_budget is None:  # asking the model takes as long as a small policy's layer
            self._default_budget = default_token_budget(module.model, module.device)
        return self._default_budget

    def chunks(self, module: Any, sequences: Sequences) -> list[slice]:
        """Rows that take one forward and backward pass together."""
        return split_by_tokens(sequences, self.token_budget(module), module.rows_together)

    def logprobs(self, module: Any, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """What `module.logprobs` gives, in the same chunks in which the rows are trained, so that the same numbers come out."""
        width = sequences.completion_ids.shape[1]
        parts = [module.logprobs(sequences.rows(chunk)) for chunk in self.chunks(module, sequences)]
        logprobs, entropies = zip(*parts, strict=True)
        return join_rows(logprobs, width), join_rows(entropies, width)

    def micro_batch(self, module: Any, batch: PolicyBatch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch."""
        ranks = module.trainer.world_size
        chunks = self.chunks(module, batch.sequences)
        chunks_of_ranks = gather_counts(len(chunks), module.device)
        # Where the model is sharded, a forward and a backward pass are made by all ranks together.
        passes = max(1, *chunks_of_ranks) if module.weights.sharded else len(chunks)
        if passes > 1:
            self._begin_gradients(module, batch_idx)
        tokens = float(batch.sequences.completion_mask.sum())
        losses, metrics = [], []
        for number in range(passes):
            last = number + 1 == passes
            if module.weights.sharded or last:
                module.check_stop()  # before ranks wait for each other
            elif module.signals.requested:
                continue
            # Torn apart, a pass would leave other ranks waiting for this one.
            with module.signals.at_once() if ranks == 1 else nullcontext():
                if number < len(chunks):
                    loss, of_chunk = module.chunk_loss(batch.rows(chunks[number]), tokens)
                    losses.append(loss.detach())
                    metrics.append(of_chunk)
                else:
                    loss = _idle_pass(module)
                if not last:
                    _backward(module.trainer, loss * ranks)
        if not passes:  # no row has an advantage: the gradient is zero, not missing, or optimizers would skip their decay
            module.check_stop()
            trained = [parameter for parameter in module.model.parameters() if parameter.requires_grad]
            loss = sum(((parameter * 0).sum() for parameter in trained), start=torch.zeros((), device=module.device))
        total = torch.stack(losses).sum() if losses else loss.detach()
        loss = loss + (total - loss.detach())  # the value of all chunks, for callbacks; the gradient of the last
        self._log(module, batch, join_ranks({"loss": total, **combine_metrics(metrics)}, chunks_of_ranks))
        # Lightning divides by the accumulated micro-batches and DDP/FSDP average over ranks; the loss is a share of a sum.
        return loss * (module.trainer.accumulate_grad_batches * ranks)

    def _begin_gradients(self, module: Any, batch_idx: int) -> None:
        """Clear old gradients at the first micro-batch of an optimizer step.

        Lightning would clear them after `training_step` and before the backward pass, when the first chunks' gradients are there.
        """
        if batch_idx % module.trainer.accumulate_grad_batches == 0:
            module.optimizers(use_pl_optimizer=False).zero_grad()
            self._gradients_begun = True

    def clear_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Clear old gradients, unless `micro_batch` has done so."""
        if not self._gradients_begun:
            optimizer.zero_grad()
        self._gradients_begun = False

    def log_gradient_norms(self, module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient norm of each group before clipping.

        Raises:
            TrainingError: If one is not finite: a step by it would make all weights nan. The scaler of float16 leaves such a
                step out and tries a smaller scale.
        """
        trainer = module.trainer
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        for group in optimizer.param_groups:
            gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            norm = total_norm(gradients, module.device, local_parts=isinstance(module.model, FullyShardedDataParallel))
            module.log(f"grad_norm/{group['name']}", norm, on_step=True, on_epoch=False)
            if not scaled and not torch.isfinite(norm):
                raise TrainingError(
                    f"the gradient of step {trainer.global_step + 1} is {float(norm)} (grad_norm/{group['name']}), "
                    "so no step was made. Look at a loss of your own, or lower model.lr_full and model.lr_lora and go on from an "
                    "earlier checkpoint"
                )

    def _log(self, module: Any, batch: PolicyBatch, shares: Mapping[str, Tensor]) -> None:
        """Log what is the same on every rank: metrics of rollouts and shares have been joined over ranks."""
        averages = self._metrics.update(dict(shares), module.trainer.accumulate_grad_batches)
        _forget(module.trainer, self._logged - averages.keys())
        self._logged = set(averages)
        # Lightning keeps what was logged until the epoch ends, and each call takes it as long as a small policy's layer: what is
        # said of a rollout is said once.
        of_rollout = {} if batch.metrics == self._logged_rollout else batch.metrics
        self._logged_rollout = batch.metrics
        values: dict[str, Any] = {**of_rollout, **averages}
        shown = {name: values[name] for name in module.shown_metrics if name in values}
        options: dict[str, Any] = {"on_step": True, "on_epoch": False, "batch_size": max(1, len(batch.sequences))}
        module.log_dict(shown, prog_bar=True, **options)
        module.log_dict({name: value for name, value in values.items() if name not in shown}, **options)


class StepMetrics:
    """Adds the shares of the micro-batches of one optimizer step.

    Lightning logs what the last micro-batch of a step reported; without this the others would not be seen.
    """

    def __init__(self) -> None:
        self._shares: dict[str, Tensor] = {}
        self._extremes: dict[str, Tensor] = {}
        self._count = 0

    def update(self, shares: dict[str, Tensor], micro_batches: int) -> dict[str, Tensor]:
        """Add a micro-batch.

        Args:
            shares: Values that add up over micro-batches; of a name that ends in `/max` or `/min` the largest or smallest is
                kept.
            micro_batches: Micro-batches in a step; after that many the next call starts anew.

        Returns:
            The values of the step so far.
        """
        if self._count >= micro_batches:
            self._shares, self._extremes, self._count = {}, {}, 0
        self._count += 1
        for name, value in shares.items():
            kept = self._extremes if is_extreme(name) else self._shares
            kept[name] = join_metric(name, kept[name], value) if name in kept else value
        return {**self._shares, **self._extremes}


def join_ranks(shares: Mapping[str, Tensor], passes: Sequence[int]) -> dict[str, Tensor]:
    """Join a micro-batch's shares over ranks: sums, and of a name that ends in `/max` or `/min` the largest or smallest.

    Args:
        shares: Of this rank, scalars on one device; at least one. A rank without passes may lack names that the others have.
        passes: Forward passes of each rank.

    Returns:
        The same on every rank; in a run of one rank, the shares as they are.
    """
    if len(passes) == 1:
        return dict(shares)
    names = list(shares)
    if 0 in passes and any(passes):  # all ranks have to reduce the same values
        whole = next(rank for rank, count in enumerate(passes) if count)
        names = gather_objects(names)[whole]
    some = next(iter(shares.values()))

    def value(name: str) -> Tensor:
        if name in shares:
            return shares[name].float()
        return torch.full((), -math.inf if name.endswith("/max") else math.inf if name.endswith("/min") else 0.0).to(some.device)

    result: dict[str, Tensor] = {}
    sums = [name for name in names if not is_extreme(name)]
    if sums:
        result |= zip(sums, sum_over_ranks(torch.stack([value(name) for name in sums])).unbind(), strict=True)
    extremes = [name for name in names if is_extreme(name)]
    if extremes:
        signs = torch.tensor([1.0 if name.endswith("/max") else -1.0 for name in extremes], device=some.device)
        largest = largest_over_ranks(torch.stack([value(name) for name in extremes]) * signs) * signs
        result |= zip(extremes, largest.unbind(), strict=True)
    return {name: result[name] for name in names}


def _idle_pass(module: Any) -> Tensor:
    """A loss of zero with a gradient of zero, from a forward pass as short as can be, for a rank with nothing to compute."""
    token = torch.zeros(1, 1, dtype=torch.long, device=module.device)
    real = torch.ones_like(token, dtype=torch.bool)
    zero: Tensor = module.logprobs(Sequences(token, real, token, real))[0].sum() * 0
    return zero


def _backward(trainer: Trainer, loss: Tensor) -> None:
    """The backward pass that Lightning runs, now; outside of autocast, and with nothing kept of what it has cast."""
    with torch.autocast(loss.device.type, enabled=False):
        trainer.strategy.backward(loss, None)
    torch.clear_autocast_cache()


def _forget(trainer: Any, names: Iterable[str]) -> None:
    """Let Lightning repeat nothing of an earlier step, where a step without a row to compute has no such value."""
    for name in names:
        trainer._results.pop(f"training_step.{name}", None)
        trainer._logger_connector._callback_metrics.pop(name, None)


def rollout_loader(module: Any, prompts: Sequence[Prompt]) -> RolloutLoader:
    """The train dataloader of `module`: rollouts of these prompts."""
    trainer = module.trainer
    epoch = trainer.current_epoch
    generator = torch.Generator(device=module.device).manual_seed(module.seed * 100_003 + 1_000_000_007 * epoch)
    return RolloutLoader(
        prompts,
        module,
        module.rollout_schedule,
        accumulate_grad_batches=lambda: trainer.accumulate_grad_batches,
        generator=generator,
        seed=module.seed,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        sum_over_ranks=sum_over_ranks,
        gather_over_ranks=gather_objects,
        epoch=epoch,
        shuffle=trainer.overfit_batches == 0,
        on_other_prompts=lambda: begin_epoch_anew(trainer),
    )


def begin_epoch_anew(trainer: Trainer) -> None:
    """Count the micro-batches of an epoch from its first, when a resumed run has another number of them in it.

    Else the epoch would end, or an optimizer step be made, after a part of a step's micro-batches. Counts over all epochs stay.
    Called between `setup_data` and the first micro-batch.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    total, current = cast("_ProcessedTracker", progress.total), cast("_ProcessedTracker", progress.current)
    count = int(trainer.num_training_batches) if progress.is_last_batch else 0  # an epoch that is over stays so
    current.ready = current.started = current.processed = count
    # A checkpoint that is saved within a micro-batch's last hook does not count it as completed; Lightning then adds it.
    current.completed = count - (total.processed - total.completed)
