"""`Teaching`: a teacher's part in a task: it adds to the advantages of a rollout, or to the loss of each step.

Axes: B sequences, T completion tokens.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from hybrid_lightning.episodes.episodes import begun_with
from hybrid_lightning.losses import Distillation, Divergence, PolicyLoss, SampledReverseKL
from hybrid_lightning.losses import functional as F
from hybrid_lightning.model.passes import Passes
from hybrid_lightning.training.generation import Generation, Listen
from hybrid_lightning.training.teachers import Teacher
from hybrid_lightning.types import PolicyBatch, Prompt, Rollouts, Sequences

# Log-probabilities and entropies; the term added to each token's loss, or None; measurements by name. Each tensor is [B, T].
Learned = tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor]]


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
            self.run.shares_failures |= teacher.is_remote
            passes.beside = partial(teacher.held_bytes, passes)

    def begin(self) -> None:
        """Free memory on the device for sampling."""
        if self.teacher is not None:
            self.teacher.release()

    def taught(
        self, rollouts: Rollouts, trained: Sequences, advantages: Tensor
    ) -> tuple[Sequences | None, Tensor, dict[str, float]]:
        """Completions as the teacher sees them, if an update needs them; advantages with the teacher's part; and metrics."""
        if self.teacher is None:
            return None, advantages, {}
        if self.distillation.of_distributions:
            seen = self._seen(rollouts, trained)
            return (None if seen is trained else seen), advantages, {}
        with self.run.stopping_together(), self.run.clock.phase("logprobs"):
            logprobs, ratio = self._log_ratio(rollouts, trained)
        mask = trained.sampled_mask
        sums = torch.stack([-ratio.sum(), logprobs[mask].sum(), mask.sum().float()])
        kl, logprob, tokens = self.run.sum_over_ranks(sums).tolist()
        metrics = {"teacher/kl": kl / max(tokens, 1), "teacher/logprob": logprob / max(tokens, 1)}
        return None, F.per_token(advantages, mask) * mask + self.distillation.coef * ratio, metrics

    def calibrated(self, rollouts: Rollouts, trained: Sequences, advantages: Tensor, loss: PolicyLoss) -> Tensor:
        """Advantages of the rollouts that score modules, with the teacher's part: the sampled KL, whatever the divergence."""
        if self.teacher is None:
            return advantages
        ratio = self._log_ratio(rollouts, trained)[1] * self.distillation.coef
        ratio = ratio if loss.takes_token_advantages else F.sequence_means(ratio, trained.sampled_mask)
        self.teacher.release()
        return F.per_sequence_as(ratio, advantages) + ratio

    def learned(self, chunk: PolicyBatch) -> Learned:
        """Forward pass of an update, with gradient."""
        if self.teacher is None or not isinstance(self.distillation, Divergence):
            logprobs, entropy = self.passes.logprobs(chunk.sequences)
            return logprobs, entropy, None, {"entropy": entropy.detach()}
        seen = self.teacher.predict(self.passes, chunk.seen_by_teacher or chunk.sequences)
        logprobs, divergence, entropy, of_teacher = self.passes.compared(chunk.sequences, seen, self.distillation)
        measured = {"entropy": entropy.detach(), "teacher/divergence": divergence.detach(), "teacher/logprob": of_teacher}
        measured["teacher/kl"] = logprobs.detach() - of_teacher
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

    def _seen(self, rollouts: Rollouts, trained: Sequences) -> Sequences:
        assert self.teacher is not None
        self.check_prompts(rollouts.prompts)  # calls from Python have not checked the prompts
        encode = self.generation.encode
        return self.teacher.seen(
            self.passes, rollouts.prompts, trained, lambda number, prompt: encode(prompt, begun_with(rollouts, number))
        )

    def _log_ratio(self, rollouts: Rollouts, trained: Sequences) -> tuple[Tensor, Tensor]:
        """The teacher's log-probabilities, and their log-ratio to the sampler, [B, T], 0 where nothing is trained."""
        assert self.teacher is not None
        logprobs = self.teacher.logprobs(self.passes, self._seen(rollouts, trained), self.run.interruptible)
        return logprobs, F.log_ratio(logprobs, rollouts.sampling_logprobs, trained.sampled_mask)
