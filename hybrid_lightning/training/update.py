"""`Update`: how an optimizer step is made of micro-batches, and a micro-batch of chunks.

Lightning asks for the loss of one micro-batch at a time: what one `training_step` gets. `accumulate_grad_batches` of them make an
optimizer step. The activations of all rows of a micro-batch may not fit into memory, so the rows are cut into chunks of at most
`max_tokens_per_micro_batch` tokens, each of which takes one forward and one backward pass. The backward passes of all chunks but
the last run here; the loss of the last is returned to Lightning, which runs its backward pass.

The loss and the metrics of a chunk are shares: parts of a sum over the chunks, micro-batches and ranks of the optimizer step (see
`losses.shares`). So neither the gradient nor what is logged depends on how rows are split.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel

from hybrid_lightning.engine import default_token_budget, memory_of
from hybrid_lightning.errors import TrainingError
from hybrid_lightning.losses.shares import combine_metrics, is_extreme
from hybrid_lightning.rollout.batching import join_rows, split_by_tokens
from hybrid_lightning.sharding.ranks import gather_counts, gather_objects, largest_over_ranks, sum_over_ranks, total_norm
from hybrid_lightning.types import PolicyBatch, Sequences

if TYPE_CHECKING:
    from hybrid_lightning.training.language import LanguageModule

_PASS_TOKENS = "tokens_of_pass"  # key in a checkpoint


def saved_pass_tokens(policy: "LanguageModule") -> dict[str, Any]:
    """The tokens of a pass that were chosen by the memory of a run's device, so that a resume splits rows alike.

    On a CPU they follow from the model's sizes, and are not kept.
    """
    total = memory_of(policy.device)
    if total is None or policy.tokens_of_pass is None:
        return {}
    return {_PASS_TOKENS: {"tokens": policy.tokens_of_pass, "memory": total}}


def restore_pass_tokens(policy: "LanguageModule", entries: Mapping[str, Any]) -> None:
    """Take what `saved_pass_tokens` wrote, unless this device is of another kind or has less memory."""
    saved, total = entries.get(_PASS_TOKENS), memory_of(policy.trainer.strategy.root_device)  # the policy may be on the CPU still
    if saved is None or total is None or policy.max_tokens_per_micro_batch:
        return
    if total >= saved["memory"]:
        policy.tokens_of_pass = saved["tokens"]
    else:
        rank_zero_info(
            f"this device has {total / 2**30:.0f} GiB, and that of the checkpoint had {saved['memory'] / 2**30:.0f}: passes "
            "take fewer tokens than before, so that sums are rounded otherwise"
        )


class Update:
    """The optimizer step in progress: its gradients so far, and the metrics of its micro-batches so far.

    A policy calls the methods from its hooks of the same purpose, and makes a new `Update` for every epoch.
    """

    def __init__(self, policy: "LanguageModule") -> None:
        self._policy = policy
        self._metrics: dict[str, Tensor] = {}  # of the step so far
        self._gradients_begun = False
        self._logged: set[str] = set()  # names of the metrics that were logged last
        self._logged_rollout: int | None = None  # number of the rollout whose metrics were logged last

    def token_budget(self) -> int:
        """The most tokens that one forward and backward pass may take."""
        policy = self._policy
        if policy.max_tokens_per_micro_batch:
            return int(policy.max_tokens_per_micro_batch)
        if policy.tokens_of_pass is None:  # computing it takes as long as one layer of a small policy
            policy.tokens_of_pass = default_token_budget(policy.model, policy.device)
        return policy.tokens_of_pass

    def chunks(self, sequences: Sequences) -> list[slice]:
        """Cut rows into chunks, each of which takes one forward and backward pass."""
        return split_by_tokens(sequences, self.token_budget(), self._policy.rows_per_example)

    def logprobs(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """`policy.logprobs` of all rows, chunk by chunk as in training, so that training gets exactly the same numbers.

        Where ranks make passes together, all have to call it, also with no rows.
        """
        policy = self._policy
        width = sequences.completion_ids.shape[1]
        chunks = self.chunks(sequences) if len(sequences) else []
        idle = 0
        if policy.weights.passes_together:
            idle = max(gather_counts(len(chunks), policy.device)) - len(chunks)
        parts = [policy.logprobs(sequences.rows(chunk)) for chunk in chunks]
        for _ in range(idle):
            _idle_pass(policy)
        if not parts:
            nothing = torch.zeros(0, width, device=policy.device)
            return nothing, nothing
        logprobs, entropies = zip(*parts, strict=True)
        return join_rows(logprobs, width), join_rows(entropies, width)

    def measure(
        self, parts: Sequence[Sequences], current: bool = True, as_trained: bool = False
    ) -> list[tuple[Tensor | None, Tensor, Tensor | None]]:
        """Without gradient, what the loss has to know about some rows beforehand; all ranks have to call it together.

        Returns:
            For each part the log-probabilities [B, T] of the policy, None if not wanted (`current`); their entropies [B, T], or
            zeros; and the log-probabilities of the start policy, None unless the loss compares with it.
        """
        policy, together = self._policy, self._policy.weights.passes_together

        def measure_one(sequences: Sequences) -> tuple[Tensor | None, Tensor, Tensor | None]:
            logprobs = reference = None
            entropy = torch.zeros(sequences.completion_ids.shape, device=policy.device)
            if len(sequences) or together:
                if current:
                    logprobs, entropy = self.logprobs(sequences)
                if policy.loss.needs_reference:
                    with policy.start_policy():
                        reference, _ = self.logprobs(sequences)
            return logprobs, entropy, reference

        def measure_all() -> list[tuple[Tensor | None, Tensor, Tensor | None]]:
            with nullcontext() if together else policy.signals.interruptible():
                return [measure_one(sequences) for sequences in parts]

        with policy.inference():
            return policy.weights.in_passes(measure_all, as_trained=as_trained)

    def micro_batch(self, batch: PolicyBatch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch, of whose chunks Lightning runs the last one's backward pass; the others have been run."""
        policy = self._policy
        ranks = policy.trainer.world_size
        chunks = self.chunks(batch.sequences)
        chunks_of_ranks = gather_counts(len(chunks), policy.device)
        # Ranks that share a sharded model make every pass together: those with fewer chunks add idle passes.
        passes = max(1, *chunks_of_ranks) if policy.weights.sharded else len(chunks)
        begins_step = batch_idx % policy.trainer.accumulate_grad_batches == 0
        if begins_step:
            self._metrics = {}
        if passes > 1 and begins_step:
            # Lightning would clear old gradients between `training_step` and the last backward pass, and the first chunks' with
            # them.
            policy.optimizers(use_pl_optimizer=False).zero_grad()  # type: ignore[union-attr]  # there is one optimizer
            self._gradients_begun = True
        tokens = float(batch.sequences.sampled_mask.sum())
        losses, metrics = [], []
        for number in range(passes):
            last = number + 1 == passes
            if policy.weights.sharded or last:
                policy.check_stop()  # before ranks wait for each other
            elif policy.signals.requested:
                continue
            # With several ranks a pass is never interrupted: the others would wait for this one forever.
            with policy.signals.interruptible() if ranks == 1 else nullcontext():
                if number < len(chunks):
                    loss, of_chunk = policy.chunk_loss(batch.rows(chunks[number]), tokens)
                    losses.append(loss.detach())
                    metrics.append(of_chunk)
                else:
                    loss = _idle_pass(policy)
                if not last:
                    _backward(policy.trainer, loss * ranks)
        if not passes:
            policy.check_stop()
            loss = _zero_loss(policy)
        total = torch.stack(losses).sum() if losses else loss.detach()
        loss = loss + (total - loss.detach())  # the value is that of all chunks, for callbacks; the gradient that of the last
        self._log(batch, join_over_ranks({"loss": total, **combine_metrics(metrics)}, chunks_of_ranks))
        # The loss is a share of a sum. Lightning divides it by the number of accumulated micro-batches, and DDP and FSDP average
        # over ranks: both is undone here.
        return loss * (policy.trainer.accumulate_grad_batches * ranks)

    def clear_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Clear old gradients when Lightning asks for it, unless `micro_batch` has done so."""
        if not self._gradients_begun:
            optimizer.zero_grad()
        self._gradients_begun = False

    def log_gradient_norms(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient norm of each group before clipping.

        Raises:
            TrainingError: If a norm is not finite, since the step would make all weights nan. Not under `16-mixed`, whose scaler
                skips such a step and lowers the scale.
        """
        policy = self._policy
        trainer = policy.trainer
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        for group in optimizer.param_groups:
            gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            norm = total_norm(gradients, policy.device, local_parts=isinstance(policy.model, FullyShardedDataParallel))
            policy.log(f"grad_norm/{group['name']}", norm, on_step=True, on_epoch=False)
            if not scaled and not torch.isfinite(norm):
                raise TrainingError(
                    f"the gradient of step {trainer.global_step + 1} is {float(norm)} (grad_norm/{group['name']}), "
                    "so no step was made. Look at a loss of your own, or lower model.lr_full and model.lr_lora and go on from an "
                    "earlier checkpoint"
                )

    def _log(self, batch: PolicyBatch, shares: Mapping[str, Tensor]) -> None:
        """Log the rollout's metrics and the step's so far, both joined over ranks already.

        Lightning logs the values of a step's last micro-batch alone, so each micro-batch reports the step so far.
        """
        policy = self._policy
        averages = self._metrics = combine_metrics([self._metrics, shares])
        _forget_logged(policy.trainer, self._logged - averages.keys())
        self._logged = set(averages)
        # Logging a value takes Lightning as long as one layer of a small policy, and it keeps the value until the epoch ends: so
        # the metrics of a rollout are logged once, and not with each of its micro-batches.
        of_rollout = {} if batch.rollout_number == self._logged_rollout else batch.metrics
        self._logged_rollout = batch.rollout_number
        values: dict[str, Any] = {**of_rollout, **averages}
        shown = {name: values[name] for name in policy.shown_metrics if name in values}
        options: dict[str, Any] = {"on_step": True, "on_epoch": False, "batch_size": max(1, len(batch.sequences))}
        policy.log_dict(shown, prog_bar=True, **options)
        policy.log_dict({name: value for name, value in values.items() if name not in shown}, **options)


def join_over_ranks(shares: Mapping[str, Tensor], chunks: Sequence[int]) -> dict[str, Tensor]:
    """Join a micro-batch's shares over ranks, whose numbers of chunks are given. All ranks have to call it.

    Each has the loss at least; one without chunks may lack names that the others have.
    """
    if len(chunks) == 1:
        return dict(shares)
    names, device = list(shares), shares["loss"].device
    if 0 in chunks and any(chunks):  # all ranks have to reduce the same values
        whole = next(rank for rank, count in enumerate(chunks) if count)
        names = gather_objects(names)[whole]
    sums, extremes = [[name for name in names if is_extreme(name) is extreme] for extreme in (False, True)]
    nothing = torch.zeros((), device=device)
    total = sum_over_ranks(torch.stack([shares.get(name, nothing).float() for name in sums]))
    result = dict(zip(sums, total.unbind(), strict=True))
    if extremes:
        signs = torch.tensor([1.0 if name.endswith("/max") else -1.0 for name in extremes], device=device)
        own = torch.stack([shares.get(name, sign * -math.inf).float() for name, sign in zip(extremes, signs, strict=True)])
        result |= zip(extremes, (largest_over_ranks(own * signs) * signs).unbind(), strict=True)
    return {name: result[name] for name in names}


def _idle_pass(policy: "LanguageModule") -> Tensor:
    """The shortest forward pass, with a loss and a gradient of zero: for a rank that has no chunk left while others have."""
    token = torch.zeros(1, 1, dtype=torch.long, device=policy.device)
    real = torch.ones_like(token, dtype=torch.bool)
    zero: Tensor = policy.logprobs(Sequences(token, real, token, real))[0].sum() * 0
    return zero


def _zero_loss(policy: "LanguageModule") -> Tensor:
    """A loss of zero for a micro-batch in which no row has an advantage.

    Its gradient is zero as well, and not None, since optimizers would then leave out weight decay.
    """
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    return sum(((parameter * 0).sum() for parameter in trained), start=torch.zeros((), device=policy.device))


def _backward(trainer: Trainer, loss: Tensor) -> None:
    """Run the backward pass of a chunk as Lightning runs that of a micro-batch: outside of autocast, whose cache is emptied."""
    with torch.autocast(loss.device.type, enabled=False):
        trainer.strategy.backward(loss, None)
    torch.clear_autocast_cache()


def _forget_logged(trainer: Any, names: Iterable[str]) -> None:
    """Remove metrics of an earlier step, which Lightning would log again where this step has no such metric."""
    for name in names:
        trainer._results.pop(f"training_step.{name}", None)
        trainer._logger_connector._callback_metrics.pop(name, None)
