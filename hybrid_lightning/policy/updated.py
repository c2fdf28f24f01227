"""`UpdatedModule`: a policy that is updated by the loss of its rollouts."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hybrid_lightning.engine import token_logprobs
from hybrid_lightning.losses import ImportanceCorrection, PolicyLoss, TopEntropyMask
from hybrid_lightning.losses.shares import share
from hybrid_lightning.policy.agreement import compare_with_sampler
from hybrid_lightning.policy.stepped import SteppedModule
from hybrid_lightning.policy.token_choice import mask_tokens
from hybrid_lightning.types import PolicyBatch, Rollouts, Sequences


class UpdatedModule(SteppedModule):
    """The loss of rollouts; a subclass sets the attributes."""

    loss: PolicyLoss
    correction: ImportanceCorrection | None
    token_mask: TopEntropyMask | None
    mask_truncated_completions: bool

    def logprobs(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [B, T] under the sampler's temperature; entropies have a gradient if the loss asks."""
        with_gradient = self.loss.needs_entropy
        return self.weights.as_forward(lambda: token_logprobs(self.engine, sequences, self.sampler.temperature, with_gradient))

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

        def add_all() -> list[tuple[PolicyBatch, Tensor]]:
            with self.signals.at_once():
                return [add(batch) for batch in batches]

        with self.stopping_together(), self.clock.phase("logprobs"), self._inference():
            filled = self.weights.gathered(add_all, as_trained=True)
        batches = [batch for batch, _ in filled]
        return batches if self.token_mask is None else mask_tokens(batches, [entropy for _, entropy in filled], self.token_mask)

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
