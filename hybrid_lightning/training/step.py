"""`OptimizerStep`: an optimizer step consists of micro-batches, and a micro-batch of chunks.

Lightning requests the loss of one micro-batch at a time, in `training_step`; `accumulate_grad_batches` micro-batches make an
optimizer step. The activations of all rows of a micro-batch may not fit into memory, so the rows are split into chunks of at most
`max_tokens_per_micro_batch` tokens. Each chunk takes one forward and one backward pass. The backward passes run here, except the
last chunk's: its loss is returned to Lightning, which runs its backward pass.

The loss and the metrics of a chunk are shares: parts of a sum over the chunks, micro-batches and ranks of the optimizer step (see
`losses.shares`). So neither the gradient nor the logged metrics depend on how rows are split.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from hybrid_lightning.errors import TrainingError
from hybrid_lightning.losses.shares import combine_metrics, is_extreme
from hybrid_lightning.model.passes import Passes
from hybrid_lightning.sharding.ranks import gather_counts, gather_objects, largest_over_ranks, sum_over_ranks, total_norm
from hybrid_lightning.training.run import Run
from hybrid_lightning.types import PolicyBatch

ChunkLoss = Callable[[PolicyBatch, float], tuple[Tensor, dict[str, Tensor]]]  # see `Task.chunk_loss`


class OptimizerStep:
    """The optimizer step in progress: its gradients so far, and the metrics of its micro-batches so far.

    A new one is made for every epoch.

    Args:
        run: The run that makes the step.
        passes: Cuts micro-batches into chunks.
        chunk_loss: Loss and metrics of a chunk, as shares of the step's loss and metrics.
        shown: Names of the metrics beside the progress bar.
    """

    def __init__(self, run: Run, passes: Passes, chunk_loss: ChunkLoss, shown: Sequence[str] = ()) -> None:
        self._run, self._passes, self._chunk_loss, self._shown = run, passes, chunk_loss, shown
        self._metrics: dict[str, Tensor] = {}  # metrics of the step so far
        self._gradients_begun = False
        self._logged: set[str] = set()  # names of the last logged metrics
        self._logged_rollout: int | None = None  # number of the rollout with the last logged metrics

    def micro_batch(self, batch: PolicyBatch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch. Lightning runs backward for the last chunk; the others have run."""
        run, passes, policy = self._run, self._passes, self._passes.policy
        chunks = passes.chunks(batch.sequences)
        chunks_of_ranks = gather_counts(len(chunks), policy.device)
        # Ranks that share a sharded model make every pass together: ranks with fewer chunks add idle passes.
        count = max(1, *chunks_of_ranks) if policy.weights.sharded else len(chunks)
        begins_step = batch_idx % run.accumulate_grad_batches == 0
        if begins_step:
            self._metrics = {}
        if count > 1 and begins_step:
            # Lightning would clear old gradients between `training_step` and the last backward pass, and lose the first chunks'
            # gradients.
            run.clear_gradients()
            self._gradients_begun = True
        tokens = float(batch.sequences.sampled_mask.sum())
        losses, metrics = [], []
        for number in range(count):
            last = number + 1 == count
            if policy.weights.sharded or last:
                run.check_stop()  # before ranks wait for each other
            elif run.signals.requested:
                continue
            # With several processes the others would wait for this one forever.
            with run.interruptible() if run.world_size == 1 else nullcontext():
                if number < len(chunks):
                    loss, of_chunk = self._chunk_loss(batch.rows(chunks[number]), tokens)
                    losses.append(loss.detach())
                    metrics.append(of_chunk)
                else:
                    loss = passes.idle()
                if not last:
                    run.backward(loss * run.world_size)
        if not count:
            run.check_stop()
            loss = self._zero_loss()
        total = torch.stack(losses).sum() if losses else loss.detach()
        loss = loss + (total - loss.detach())  # the value of all chunks, for callbacks; the gradient of the last
        self._log(batch, join_over_ranks({"loss": total, **combine_metrics(metrics)}, chunks_of_ranks))
        # The loss is a share of a sum. This undoes Lightning's division by the number of accumulated micro-batches, and the
        # average of DDP and FSDP over ranks.
        return loss * (run.accumulate_grad_batches * run.world_size)

    def clear_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Clear old gradients when Lightning requests it, unless `micro_batch` has already cleared them."""
        if not self._gradients_begun:
            optimizer.zero_grad()
        self._gradients_begun = False

    def log_gradient_norms(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient norm of each group before clipping.

        Raises:
            TrainingError: If a norm is not finite, since the step would make all weights nan. Not under `16-mixed`: its scaler
                skips such a step and lowers the scale.
        """
        run = self._run
        for group in optimizer.param_groups:
            gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            norm = total_norm(gradients, self._passes.policy.device)
            run.log({f"grad_norm/{group['name']}": norm})
            if not run.scales_loss and not torch.isfinite(norm):
                raise TrainingError(
                    f"the gradient of step {run.step + 1} is {float(norm)} (grad_norm/{group['name']}), so no step was made; "
                    "check the loss, if it is yours, or lower model.lr_full and model.lr_lora and resume from an earlier "
                    "checkpoint"
                )

    def _log(self, batch: PolicyBatch, shares: Mapping[str, Tensor]) -> None:
        """Log the rollout's metrics and the step's metrics so far, both already joined over ranks.

        Lightning logs only the values of a step's last micro-batch, so each micro-batch reports the step so far.
        """
        averages = self._metrics = combine_metrics([self._metrics, shares])
        self._run.forget([name for name in self._logged if name not in averages])
        self._logged = set(averages)
        # Logging a value takes as long as one layer of a small policy, and Lightning keeps the value until the epoch ends. So a
        # rollout's metrics are logged once, not with each of its micro-batches.
        of_rollout = {} if batch.rollout_number == self._logged_rollout else batch.metrics
        self._logged_rollout = batch.rollout_number
        self._run.log({**of_rollout, **averages}, self._shown, max(1, len(batch.sequences)))

    def _zero_loss(self) -> Tensor:
        """A loss of zero for a micro-batch in which no row has an advantage.

        Its gradient is zero, not None, since optimizers would skip weight decay for None.
        """
        policy = self._passes.policy
        trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
        return sum(((parameter * 0).sum() for parameter in trained), start=torch.zeros((), device=policy.device))


def join_over_ranks(shares: Mapping[str, Tensor], chunks: Sequence[int]) -> dict[str, Tensor]:
    """Join a micro-batch's shares over ranks, given the ranks' numbers of chunks. All ranks must call this.

    Each rank has at least the loss; a rank without chunks may have no entry for the other names.
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
    result: dict[str, Any] = dict(zip(sums, total.unbind(), strict=True))
    if extremes:
        signs = torch.tensor([1.0 if name.endswith("/max") else -1.0 for name in extremes], device=device)
        own = torch.stack([shares.get(name, sign * -math.inf).float() for name, sign in zip(extremes, signs, strict=True)])
        result |= zip(extremes, (largest_over_ranks(own * signs) * signs).unbind(), strict=True)
    return {name: result[name] for name in names}
