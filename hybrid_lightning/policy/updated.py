"""`UpdatedModule`: a policy that is updated by the loss of its rollouts.

Lightning asks for the loss of one micro-batch at a time (`accumulate_grad_batches` of them make an optimizer step). Its rows may
be more tokens than memory holds activations for, so `training_step` cuts them into runs of at most
`max_tokens_per_micro_batch` tokens. All but the last run go backward at once; the loss of the last is returned to Lightning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel

from hybrid_lightning.losses import ImportanceCorrection, PolicyLoss, TopEntropyMask
from hybrid_lightning.losses.shares import combine_metrics, share
from hybrid_lightning.policy.agreement import compare_with_sampler
from hybrid_lightning.policy.evaluated import EvaluatedModule
from hybrid_lightning.policy.logprobs import token_logprobs
from hybrid_lightning.policy.step_metrics import StepMetrics, join_ranks
from hybrid_lightning.policy.step_times import PhaseClock
from hybrid_lightning.policy.token_budget import default_token_budget
from hybrid_lightning.policy.token_choice import mask_tokens
from hybrid_lightning.rollout.micro_batches import join_rows, split_by_tokens
from hybrid_lightning.sharding.forward import as_forward, is_sharded, with_whole_weights
from hybrid_lightning.sharding.norms import total_norm
from hybrid_lightning.sharding.ranks import gather_counts
from hybrid_lightning.types import PolicyBatch, Rollouts, Sequences


class UpdatedModule(EvaluatedModule):
    """The training hooks; a subclass sets the attributes."""

    loss: PolicyLoss
    correction: ImportanceCorrection | None
    token_mask: TopEntropyMask | None
    mask_truncated_completions: bool
    max_tokens_per_micro_batch: int | None
    clock: PhaseClock

    def __init__(self) -> None:
        super().__init__()
        self._step_metrics = StepMetrics()
        self._gradients_begun = False

    def logprobs(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [B, T] under the sampler's temperature; entropies have a gradient if the loss asks."""
        with_gradient = self.loss.needs_entropy
        return as_forward(self.model, lambda: token_logprobs(self.model, sequences, self.sampler.temperature, with_gradient))

    def taught_sequences(self, rollouts: Rollouts) -> Sequences:
        """The sequences of rollouts as the loss sees them: a completion that is masked has no tokens."""
        sequences = rollouts.sequences
        if not self.mask_truncated_completions:
            return sequences
        return replace(sequences, completion_mask=sequences.completion_mask & rollouts.finished[:, None])

    def takes_part(self, advantages: Tensor) -> Tensor:
        """Rows that an update needs (see `RolloutSource`): those with an advantage, if the loss ignores the others."""
        return advantages != 0 if self.loss.ignores_zero_advantage else torch.ones_like(advantages, dtype=torch.bool)

    def add_logprobs(self, batches: Sequence[PolicyBatch], on_policy: bool) -> list[PolicyBatch]:
        """Fill in old and reference log-probabilities and the mask of tokens, where they are needed (see `RolloutSource`).

        Old ones come from the same forward pass that trains, not from the sampler: on the first minibatch the ratio is then
        exactly 1, which GSPO's narrow clip range needs.
        """
        if on_policy and not self.loss.needs_reference and self.token_mask is None:
            return list(batches)

        def add(batch: PolicyBatch) -> tuple[PolicyBatch, Tensor]:
            old = reference = None
            entropy = torch.zeros(batch.sequences.completion_mask.shape, device=self.device)
            if not len(batch.sequences):
                return batch, entropy
            if not on_policy or self.token_mask is not None:
                old, entropy = self._constant_logprobs(batch.sequences)
            if self.loss.needs_reference:
                with self.start_policy():
                    reference, _ = self._constant_logprobs(batch.sequences)
            return batch.with_logprobs(None if on_policy else old, reference), entropy

        with self.clock.phase("logprobs"), self._inference():
            filled = with_whole_weights(self.model, lambda: [add(batch) for batch in batches], as_trained=True)
        batches = [batch for batch, _ in filled]
        return batches if self.token_mask is None else mask_tokens(batches, [entropy for _, entropy in filled], self.token_mask)

    def _constant_logprobs(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """What `logprobs` gives, in the same runs of rows in which they are trained, so that the same numbers come out."""
        runs = split_by_tokens(sequences, self._token_budget())
        width = sequences.completion_ids.shape[1]
        logprobs, entropies = zip(*(self.logprobs(sequences.rows(run)) for run in runs), strict=True)
        return join_rows(logprobs, width), join_rows(entropies, width)

    def _token_budget(self) -> int:
        return self.max_tokens_per_micro_batch or default_token_budget(self.model, self.device)

    def on_train_epoch_start(self) -> None:
        """An epoch begins with an optimizer step, also after one that was cut short within a step."""
        self._step_metrics = StepMetrics()
        self._gradients_begun = False

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """The update begins, after all callbacks' hooks of this name; `StepTimer` sees its end before any other callback."""
        self.clock.switch("update")

    def training_step(self, batch: PolicyBatch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch."""
        ranks = self.trainer.world_size
        runs = split_by_tokens(batch.sequences, self._token_budget())
        runs_of_ranks = gather_counts(len(runs), self.device)
        # Where the model is sharded, a forward and a backward pass are made by all ranks together.
        passes = max(1, *runs_of_ranks) if is_sharded(self.model) else len(runs)
        if passes > 1:
            self._begin_gradients(batch_idx)
        tokens = float(batch.sequences.completion_mask.sum())
        losses, metrics = [], []
        for number in range(passes):
            if number < len(runs):
                loss, of_run = self._run(batch.rows(runs[number]), tokens)
                losses.append(loss.detach())
                metrics.append(of_run)
            else:
                loss = self._idle_run()
            if number + 1 < passes:
                self._backward(loss * ranks)
        if not passes:  # no row has an advantage: the gradient is zero, not missing, or optimizers would skip their decay
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

    def _run(self, batch: PolicyBatch, micro_batch_tokens: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a run of rows of a micro-batch, all of them shares in the optimizer step's."""
        logprobs, entropy = self.logprobs(batch.sequences)
        inputs, metrics = compare_with_sampler(batch, logprobs, self.correction)
        inputs = replace(
            inputs,
            entropy=entropy,
            max_completion_tokens=float(self.sampler.max_new_tokens),
            micro_batch_tokens=micro_batch_tokens,
            num_micro_batches=float(self.trainer.accumulate_grad_batches * self.trainer.world_size),
        )
        metrics["entropy"] = share(entropy.detach(), inputs)
        if batch.policy_mask is not None:
            metrics["top_entropy/share"] = share(batch.policy_mask.to(entropy.dtype), inputs)
        output = self.loss(inputs)
        return output.loss, {**output.metrics, **metrics}

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
        shown: dict[str, Any] = {
            name: batch.metrics[name] for name in ("reward", "completions/mean_length") if name in batch.metrics
        }
        hidden = {name: value for name, value in batch.metrics.items() if name not in shown}
        options: dict[str, Any] = {
            "on_step": True,
            "on_epoch": False,
            "batch_size": max(1, len(batch.sequences)),
        }
        self.log_dict(shown, prog_bar=True, **options)
        self.log_dict({**hidden, **averages}, **options)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient norm of each group before clipping."""
        for group in optimizer.param_groups:
            gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            norm = total_norm(gradients, self.device, local_parts=isinstance(self.model, FullyShardedDataParallel))
            self.log(f"grad_norm/{group['name']}", norm, on_step=True, on_epoch=False)
