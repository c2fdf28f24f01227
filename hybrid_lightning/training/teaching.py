"""`Teaching`: a teacher's part in a task: it adds to the advantages of a rollout, or to the loss of each step.

Axes: B sequences, T completion tokens.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hybrid_lightning.episodes.episodes import begun_with
from hybrid_lightning.losses import Distillation, Divergence, PolicyLoss, SampledReverseKL
from hybrid_lightning.losses import functional as F
from hybrid_lightning.model.passes import Passes
from hybrid_lightning.training.generation import Generation, Listen
from hybrid_lightning.training.teachers import Teacher
from hybrid_lightning.types import PolicyBatch, Prompt, Rollout, Sequences

# Log-probabilities and entropies; the term added to each token's loss, or None; measurements by name. Each tensor is [B, T].
Predicted = tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor]]


class Teaching:
    """Learning from a teacher, in addition to rewards. Without a teacher, it changes nothing.

    Args:
        passes: Log-probabilities of the policy.
        generation: Completes the prompts of the policy.
        teacher: The teacher; None to learn from rewards alone.
        distillation: How to learn from the teacher; None for `SampledReverseKL()`.
    """

    def __init__(
        self, passes: Passes, generation: Generation, teacher: Teacher | None, distillation: Distillation | None = None
    ) -> None:
        self.passes, self.generation, self.run, self.teacher = passes, generation, generation.run, teacher
        self.distillation = distillation or SampledReverseKL()
        self.listen: Listen | None = None
        self.shown_metrics: tuple[str, ...] = ()  # in the progress bar
        self.needs_start_policy = self.needs_all_rows = False
        if teacher is not None:
            self.listen, self.needs_start_policy, self.shown_metrics = teacher.listen, teacher.needs_start_policy, ("teacher/kl",)
            self.needs_all_rows = self.distillation.of_distributions

    def free_memory(self) -> None:
        """Free memory on the device for sampling."""
        if self.teacher is not None:
            self.teacher.release()

    def teach(self, rollout: Rollout, trained: Sequences) -> tuple[Rollout, Sequences | None]:
        """Add the teacher's part to the advantages and metrics of a rollout; or show it the rows, if an update needs them.

        `trained` are the rows as the loss sees them. Returns the rollout, and the rows as the teacher sees them or None.
        """
        if self.teacher is None:
            return rollout, None
        if self.distillation.of_distributions:
            shown = self._show(rollout, trained)
            return rollout, None if shown is trained else shown
        with self.run.stopping_together(), self.run.clock.phase("logprobs"):
            logprobs, ratio = self._log_ratio(rollout, trained)
        mask = trained.sampled_mask
        sums = torch.stack([-ratio.sum(), logprobs[mask].sum(), mask.sum().float()])
        kl, logprob, tokens = self.run.sum_over_ranks(sums).tolist()
        metrics = {"teacher/kl": kl / max(tokens, 1), "teacher/logprob": logprob / max(tokens, 1)}
        advantages = F.per_token(_of_rows(rollout), mask) * mask + self.distillation.coef * ratio
        return replace(rollout, token_advantages=advantages, metrics=rollout.metrics | metrics), None

    def teach_calibration(self, rollout: Rollout, trained: Sequences, loss: PolicyLoss) -> Rollout:
        """Add the teacher's part to the advantages of calibration: the sampled KL, whatever the divergence."""
        if self.teacher is None:
            return rollout
        ratio, advantages = self._log_ratio(rollout, trained)[1] * self.distillation.coef, _of_rows(rollout)
        self.teacher.release()
        if loss.takes_token_advantages:
            return replace(rollout, token_advantages=F.per_sequence_as(ratio, advantages) + ratio)
        assert rollout.advantages is not None, "estimated before"
        sums, tokens = (rollout.sum_rows(values.sum(dim=1)) for values in (ratio, trained.sampled_mask))
        return replace(rollout, advantages=rollout.advantages + sums / tokens.clamp(min=1))

    def predict(self, chunk: PolicyBatch) -> Predicted:
        """Forward pass of an update, with gradient."""
        if self.teacher is None or not isinstance(self.distillation, Divergence):
            logprobs, entropy = self.passes.logprobs(chunk.sequences)
            return logprobs, entropy, None, {"entropy": entropy.detach()}
        of_teacher = self.teacher.predict(self.passes, chunk.seen_by_teacher or chunk.sequences)
        logprobs, divergence, entropy, at_tokens = self.passes.compared(chunk.sequences, of_teacher, self.distillation)
        measured = {"entropy": entropy.detach(), "teacher/divergence": divergence.detach(), "teacher/logprob": at_tokens}
        measured["teacher/kl"] = logprobs.detach() - at_tokens
        return logprobs, entropy, self.distillation.coef * divergence, measured

    def check(self) -> None:
        """Raise ConfigError if the teacher cannot teach this policy."""
        if self.teacher is not None and self.run.stage == "fit":
            self.teacher.check(self.passes, self.distillation)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise ConfigError if training prompts are too long for the teacher, or have no column that it needs.

        A remote teacher checks its own context.
        """
        if self.teacher is not None and not self.teacher.is_remote:
            self.teacher.check_prompts(self.generation, prompts)

    def _show(self, rollout: Rollout, trained: Sequences) -> Sequences:
        """The rows as the teacher sees them."""
        assert self.teacher is not None
        self.check_prompts(rollout.prompts)  # calls from Python have not checked the prompts
        encode = self.generation.encode
        numbers = (rollout.episode_of_row // rollout.group_size).tolist()
        return self.teacher.show(
            self.passes, rollout.prompts, numbers, trained, lambda number, prompt: encode(prompt, begun_with(rollout, number))
        )

    def _log_ratio(self, rollout: Rollout, trained: Sequences) -> tuple[Tensor, Tensor]:
        """The teacher's log-probabilities, and their log-ratio to the sampler, [R, T], 0 where nothing is trained."""
        assert self.teacher is not None
        logprobs = self.teacher.logprobs(self.passes, self._show(rollout, trained), self.run.interruptible)
        return logprobs, F.log_ratio(logprobs, rollout.sampling_logprobs, trained.sampled_mask)


def _of_rows(rollout: Rollout) -> Tensor:
    """The advantages of tokens, [R, T], or of rows, [R]."""
    assert rollout.advantages is not None, "estimated before"
    return rollout.of_rows(rollout.advantages) if rollout.token_advantages is None else rollout.token_advantages
