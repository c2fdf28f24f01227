"""Policies that are trained on completions that the data has, instead of their own: supervised fine-tuning, and DPO.

    examples -> PolicyBatch -> loss -> optimizer

All is as for a policy that samples (`RolloutLoader`, micro-batches, packed rows in which a prompt is shared by its completions,
denominators of the whole optimizer step), but that a "rollout" is looked up: each prompt comes with its completions
(`Prompt.completions`), and one rollout is one optimizer step. Examples are complete or an error: none is cut.
"""

import zlib
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hybrid_lightning.engine import token_logprobs
from hybrid_lightning.errors import ConfigError, DataError
from hybrid_lightning.losses import DPOLoss, ExampleLoss, SupervisedLoss
from hybrid_lightning.policy.calibration import ExampleCalibration, training_prompts
from hybrid_lightning.policy.evaluation import ExampleMetrics
from hybrid_lightning.policy.language import LanguageModule
from hybrid_lightning.rewards import RewardFunction
from hybrid_lightning.rollout.batching import pad_left, pad_right
from hybrid_lightning.rollout.loader import DrawPrompts, RolloutLoader, RolloutSchedule
from hybrid_lightning.types import LossInputs, PolicyBatch, Prompt, Sequences

__all__ = ["ExampleModule", "PreferenceModule", "SupervisedModule"]


class ExampleModule(LanguageModule):
    """Training and held-out loss on examples; a subclass says which loss is meant and how an example has to look.

    Args:
        loss: Loss of examples; None takes the class's own (`default_loss`).
        reward: Scores completions of held-out prompts; validation and test then generate, too. None measures the loss alone.
        examples_per_step: Examples (of a loss of pairs: pairs) of an optimizer step, over all devices and micro-batches.
        **kwargs: See `LanguageModule`.

    Raises:
        ConfigError: If a value is impossible.
        ModelError: If the model cannot be loaded.
    """

    default_loss: type[ExampleLoss]
    completions_wanted: str  # how an example has to look, for error messages

    def __init__(
        self,
        loss: ExampleLoss | None = None,
        reward: RewardFunction | None = None,
        *,
        examples_per_step: int = 32,
        **kwargs: Any,
    ) -> None:
        if examples_per_step < 1:
            raise ConfigError(f"model.examples_per_step must be at least 1, got {examples_per_step}")
        trained_by = loss or self.default_loss()
        schedule = RolloutSchedule(examples_per_step, trained_by.rows_per_example)
        super().__init__(trained_by, reward, schedule, **kwargs)
        self.examples_per_step = examples_per_step
        self.rows_together = trained_by.rows_per_example
        self.example_metrics = torch.nn.ModuleDict({"val": ExampleMetrics(), "test": ExampleMetrics()})

    # ---- training data

    def rollout_loader(self, prompts: Sequence[Prompt]) -> RolloutLoader:
        """The train dataloader: optimizer steps of these examples. A data module's `train_dataloader` returns it."""
        self.check_enough(prompts)
        return super().rollout_loader(prompts)

    def roll_out(
        self, prompts: Sequence[Prompt], generator: torch.Generator, draw_more: DrawPrompts | None = None
    ) -> tuple[Sequences, Tensor, Tensor, dict[str, float]]:
        """Look up the completions of prompts (see `RolloutSource`); they have no rewards, and advantages of 1."""
        sequences = self.example_sequences(prompts, self.device)
        ones = torch.ones(len(sequences), device=self.device)
        return sequences, torch.zeros(sequences.completion_ids.shape, device=self.device), ones, {}

    def takes_part(self, advantages: Tensor) -> Tensor:
        """All rows."""
        return torch.ones_like(advantages, dtype=torch.bool)

    def add_logprobs(self, batches: Sequence[PolicyBatch], on_policy: bool) -> list[PolicyBatch]:
        """Fill in log-probabilities under the start policy, where the loss compares with it (see `RolloutSource`)."""
        if not self.loss.needs_reference:
            return list(batches)

        def add(batch: PolicyBatch) -> PolicyBatch:
            with self.start_policy():
                return batch.with_logprobs(None, self.update.logprobs(self, batch.sequences)[0])

        def add_all() -> list[PolicyBatch]:
            with self.signals.at_once():
                return [add(batch) for batch in batches]

        with self.stopping_together(), self.clock.phase("logprobs"), self.inference():
            filled = self.weights.gathered(add_all, as_trained=True)
        return filled

    def example_sequences(self, prompts: Sequence[Prompt], device: torch.device) -> Sequences:
        """Prompts and completions as tokens, the completions of a prompt below each other.

        Raises:
            DataError: If a row lacks its completions, or is longer than the model can read.
        """
        rows = [self._tokens(prompt) for prompt in prompts]
        pad = self.tokenizer.pad_token_id
        pad = int(self.tokenizer.eos_token_id if pad is None else pad)
        asked = [ids for ids, completions in rows for _ in completions]
        said = [ids for _, completions in rows for ids in completions]
        return Sequences(*pad_left(asked, pad, device), *pad_right(said, pad, device))

    def _tokens(self, prompt: Prompt) -> tuple[list[int], list[list[int]]]:
        where = f"{prompt.source or 'the data'} row {prompt.index}"
        if len(prompt.completions) != self.loss.rows_per_example:
            raise DataError(
                f"{where} has {len(prompt.completions)} completions, but {type(self).__name__} needs {self.completions_wanted}"
            )
        asked = self.encode(prompt)
        said = [self.pretrained.encoder.encode_completion(prompt, text, self.pretrained.stop_ids) for text in prompt.completions]
        longest = len(asked) + max(map(len, said))
        limit = getattr(self.pretrained.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise DataError(
                f"{where} has {longest} tokens ({len(asked)} of the prompt), more than the {limit} that the model reads; shorten "
                "or remove the row, or drop long prompts by data.max_prompt_tokens (examples are never cut)"
            )
        return asked, said

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Make sure that all examples can be trained on, and their answers be rewarded, before anything is spent."""
        if self.reward is not None:
            super().check_prompts(prompts)
        for prompt in prompts:
            self._tokens(prompt)

    def check_settings(self) -> None:
        """Called before scoring and before training.

        Raises:
            ConfigError: For the reasons of `LanguageModule`, or if examples of a step cannot be dealt evenly.
        """
        super().check_settings()
        if self.trainer.state.fn == "predict" and self.reward is None:
            raise ConfigError("predict scores completions: give model.reward, such as ExactMatch")
        if self.trainer.state.fn == "fit":
            devices, accumulate = self.trainer.world_size, self.trainer.accumulate_grad_batches
            if self.examples_per_step % (devices * accumulate):
                raise ConfigError(
                    f"model.examples_per_step={self.examples_per_step} must be a multiple of the {devices} devices x "
                    f"trainer.accumulate_grad_batches={accumulate}; change one"
                )

    def check_enough(self, prompts: Sequence[Prompt]) -> None:
        """Raise ConfigError if these training examples are fewer than one optimizer step takes."""
        if len(prompts) < self.examples_per_step:
            raise ConfigError(
                f"model.examples_per_step={self.examples_per_step} is more than the {len(prompts)} training examples; lower it "
                "or give more data"
            )

    # ---- loss

    def logprobs(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Log-probabilities with gradient and entropies [B, T] of completions."""
        return self.weights.as_forward(lambda: token_logprobs(self.engine, sequences, 1.0))

    def chunk_loss(self, chunk: PolicyBatch, micro_batch_tokens: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a chunk of a micro-batch's rows, all of them shares in the optimizer step's."""
        logprobs, entropy = self.logprobs(chunk.sequences)
        output = self.loss(replace(chunk.loss_inputs(logprobs), entropy=entropy.detach()))
        return output.loss, output.metrics

    def calibration_losses(self, num_prompts: int | None = None) -> ExampleCalibration:
        """Losses whose mean gradient scores the modules: the training loss of training examples under the start policy.

        Args:
            num_prompts: Training examples to use; fewer if there are not as many. None: as many as one optimizer step has.

        Raises:
            ConfigError: If there are no training examples.
        """
        prompts = training_prompts(self.trainer)
        self.check_enough(prompts)
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(self.seed + 7919)).tolist()
        chosen = [prompts[i] for i in order[: num_prompts or self.examples_per_step]]
        # Not self.device: the callback has moved the model, and Lightning moves this module only after the setup hooks.
        sequences = self.example_sequences(chosen, next(self.model.parameters()).device)
        losses = ExampleCalibration(sequences, self.update.chunks(self, sequences), self.loss, self.calibration_logprobs)
        losses.info["prompts"] = len(chosen)
        return losses

    # ---- evaluation: the held-out loss, and where there is a reward what the policy makes of the prompts

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
                logprobs, entropy = self.update.logprobs(self, sequences)
                if self.loss.needs_reference:
                    with self.start_policy():
                        reference, _ = self.update.logprobs(self, sequences)
            ones = torch.ones(len(sequences), device=self.device)
            return LossInputs(logprobs, ones, sequences.completion_mask, ref_logprobs=reference, entropy=entropy)

        with self.inference():
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


class SupervisedModule(ExampleModule):
    """Supervised fine-tuning, on completions only.

    Data is a `PromptDataModule` whose format is a `DemonstrationFormat`. The model is frozen as loaded; `HybridAdapterSetup`
    makes part of it trainable, scored by the gradient of the supervised loss. What comes out can be exported and be the start
    policy of a `PolicyModule`.

    Arguments and errors are those of `ExampleModule`.
    """

    default_loss = SupervisedLoss
    completions_wanted = "one: give data.format=DemonstrationFormat"
    shown_metrics = ("loss",)


class PreferenceModule(ExampleModule):
    """Preference alignment by a loss of pairs, such as DPO.

    Data is a `PromptDataModule` whose format is a `PreferenceFormat`; chosen and rejected completion share their prompt's forward
    and backward pass. The start policy, with which the loss compares, is the model with its adapter switched off: there is no
    second one. `HybridAdapterSetup` scores the modules by the gradient of the loss at the start policy.

    Arguments and errors are those of `ExampleModule`.
    """

    default_loss = DPOLoss
    completions_wanted = "two, the chosen and the rejected one: give data.format=PreferenceFormat"
    shown_metrics = ("loss", "rewards/accuracies")
