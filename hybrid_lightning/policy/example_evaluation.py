"""`EvaluatedExamples`: the held-out loss of examples, and where there is a reward what the policy makes of their prompts."""

import zlib
from abc import abstractmethod
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from hybrid_lightning.losses import ExampleLoss
from hybrid_lightning.policy.example_metrics import ExampleMetrics
from hybrid_lightning.policy.stepped import SteppedModule
from hybrid_lightning.rewards import RewardFunction
from hybrid_lightning.types import LossInputs, Prompt, Sequences


class EvaluatedExamples(SteppedModule):
    """Validation and test hooks of a policy that is trained on examples; a subclass sets the attributes."""

    loss: ExampleLoss
    reward: RewardFunction | None  # type: ignore[assignment]  # of generated completions, which are then evaluated too
    example_metrics: torch.nn.ModuleDict  # of `val` and `test`

    @abstractmethod
    def example_sequences(self, prompts: Sequence[Prompt], device: torch.device) -> Sequences:
        """Prompts and completions as tokens, the completions of a prompt below each other."""

    def validation_names(self, sets: Collection[str]) -> list[str]:
        """What a validation on examples of these sets logs."""
        rows = torch.zeros(self.loss.rows_per_example, 1)
        reference = rows if self.loss.needs_reference else None
        inputs = LossInputs(rows, rows[:, 0], torch.ones_like(rows, dtype=torch.bool), ref_logprobs=reference, entropy=rows)
        measured = [f"val/{name}" for name in self.loss.terms(inputs)]
        return measured if self.reward is None else measured + super().validation_names(sets)

    def _measure(self, prompts: Sequence[Prompt], metrics: ExampleMetrics) -> None:
        sequences = self.example_sequences(prompts, self.device)

        def terms() -> LossInputs:
            reference = None
            with self.signals.at_once():
                logprobs, entropy = self._constant_logprobs(sequences)
                if self.loss.needs_reference:
                    with self.start_policy():
                        reference, _ = self._constant_logprobs(sequences)
            ones = torch.ones(len(sequences), device=self.device)
            return LossInputs(logprobs, ones, sequences.completion_mask, ref_logprobs=reference, entropy=entropy)

        with self._inference():
            inputs = self.weights.gathered(terms)
        identity = [zlib.crc32(prompt.set_name.encode()) << 30 | prompt.index for prompt in prompts]
        weights = self.loss.weights(sequences.completion_mask)
        metrics.update(torch.tensor(identity, device=self.device), weights, self.loss.terms(inputs))

    def validation_step(self, batch: Sequence[Prompt], *place: Any, **places: Any) -> None:
        """Loss of a batch of examples, and completions of their prompts if there is a reward."""
        with self.stopping_together() if self.trainer.state.fn == "fit" else nullcontext():
            self._measure(batch, self.example_metrics["val"])  # type: ignore[arg-type]
        if self.reward is not None:
            super().validation_step(batch, *place, **places)

    def on_validation_epoch_end(self) -> None:
        """Log `val/...`."""
        if self.reward is not None:
            super().on_validation_epoch_end()
        self._log_measured("val")

    def test_step(self, batch: Sequence[Prompt], *place: Any, **places: Any) -> None:
        """As in validation."""
        self._measure(batch, self.example_metrics["test"])  # type: ignore[arg-type]
        if self.reward is not None:
            super().test_step(batch, *place, **places)

    def on_test_epoch_end(self) -> None:
        """Log `test/...`."""
        if self.reward is not None:
            super().on_test_epoch_end()
        self._log_measured("test")

    def _log_measured(self, prefix: str) -> None:
        metrics: Any = self.example_metrics[prefix]
        measured = {name: float(value) for name, value in metrics.compute().items()}
        # Every rank has the same values; `sync_dist` lets Lightning know.
        self.log_dict({f"{prefix}/{name}": value for name, value in measured.items()}, sync_dist=self.trainer.world_size > 1)
        evaluation = self.last_evaluation if self.reward is not None else {}
        self.last_evaluation = {**evaluation, "": {**measured, **evaluation.get("", {})}}
        metrics.reset()
