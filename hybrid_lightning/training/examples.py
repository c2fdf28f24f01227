"""Policies that are trained on completions in the data instead of their own: supervised fine-tuning, and DPO.

    examples -> PolicyBatch -> loss -> optimizer

A step is made as for a policy that samples (see `language.py`), with one difference: a "rollout" is looked up, not sampled. Each
prompt comes with its completions (`Prompt.completions`), and one rollout is one optimizer step. An example that is too long for
the model is an error; none is cut.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from hybrid_lightning.adapters.scoring_progress import ScoringProgress
from hybrid_lightning.engine import token_logprobs
from hybrid_lightning.errors import ConfigError, DataError
from hybrid_lightning.losses import DPOLoss, ExampleLoss, SupervisedLoss
from hybrid_lightning.model.pretrained import Pretrained
from hybrid_lightning.model.quantization import Quantization
from hybrid_lightning.rewards import RewardFunction
from hybrid_lightning.rollout.batching import pad_left, pad_right, pad_token
from hybrid_lightning.rollout.loader import DrawPrompts, RolloutLoader, RolloutSchedule, TrainedRollout
from hybrid_lightning.rollout.rollout_engine import RolloutEngine
from hybrid_lightning.training.calibration import CalibrationLosses, StepCalibration, TrainingCalibration, equal_slices
from hybrid_lightning.training.evaluation import ExampleEvaluation
from hybrid_lightning.training.language import LanguageModule
from hybrid_lightning.training.optim import LearningRateSchedule, OptimizerCallable
from hybrid_lightning.training.training_data import training_prompts
from hybrid_lightning.types import PolicyBatch, Prompt, Sequences

__all__ = ["ExampleModule", "PreferenceModule", "SupervisedModule"]


class ExampleModule(LanguageModule):
    """Trains and evaluates by a loss on examples, such as one of your own.

    Args:
        loss: Loss on examples; None takes that of the class, if it has one.
        reward: Scores completions of held-out prompts, which validation and test then generate as well. None evaluates the loss
            alone.
        examples_per_step: Examples (pairs, for a loss on pairs) in an optimizer step, over all devices and micro-batches.
        model: `embedded`, a folder (also one with an adapter alone), a GGUF file, `package:NAME/FILE`, or a hub id.
        revision: Branch, tag or commit of a hub model.
        dtype: Dtype of the weights: `float32`, or `bfloat16` together with `trainer.precision=bf16-mixed` or `bf16-true`.
        attn_implementation: Attention, such as `sdpa`, `eager`, `flash_attention_2`; None lets transformers choose.
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them.
        chat_template: Jinja template for chat prompts; None takes the tokenizer's own, and `keep_history` that one with every
            turn of the assistant as it was, thoughts included.
        chat_template_kwargs: Variables of the chat template.
        sampler: Makes completions, and has the parameters of decoding: `Sampler`, `VLLMSampler`, `VLLMServerSampler`; None takes
            `Sampler()`.
        eval_samples: Sampled completions per prompt in validation, test and predict (the n of avg@n), beside the greedy one.
        max_tokens_per_micro_batch: Most tokens of prompts and completions in one forward and backward pass; a prompt counts once
            for all its completions. A smaller number takes less memory for activations and gives the same gradient. None chooses
            by the sizes of the model (see `default_token_budget`).
        seed: Seed of the order of the data, of sampling and of evaluation.
        quantization: Quantizes the frozen base once the modules are scored, such as `NF4()`; None keeps it as it is.
        optimizer: Makes the optimizer of the parameter groups that it is called with.
        lr_full: Learning rate of fully trained modules; None takes `lr_lora` times 96 / hidden size, at most `lr_lora`.
        lr_lora: Learning rate of LoRA weights.
        schedule: Learning rate schedule; None takes `ConstantSchedule()`.

    Raises:
        ConfigError: If a value is impossible, or there is no loss.
        ModelError: If the model cannot be loaded.
    """

    default_loss: type[ExampleLoss] | None = None
    training_metrics = LanguageModule.training_metrics | {"entropy", "logps", "rewards"}  # what losses on examples measure

    def __init__(
        self,
        loss: ExampleLoss | None = None,
        reward: RewardFunction | None = None,
        *,
        examples_per_step: int = 32,
        model: str = "embedded",
        revision: str | None = None,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        sampler: RolloutEngine | None = None,
        eval_samples: int = 8,
        max_tokens_per_micro_batch: int | None = None,
        seed: int = 0,
        quantization: Quantization | None = None,
        optimizer: OptimizerCallable = AdamW,
        lr_full: float | None = None,
        lr_lora: float = 1e-4,
        schedule: LearningRateSchedule | None = None,
    ) -> None:
        if examples_per_step < 1:
            raise ConfigError(f"model.examples_per_step must be at least 1, got {examples_per_step}")
        trained_by = self.default_loss() if loss is None and self.default_loss is not None else loss
        if trained_by is None:
            raise ConfigError("ExampleModule needs model.loss; or take SupervisedModule or PreferenceModule, which have one")
        super().__init__(
            trained_by,
            reward,
            RolloutSchedule(examples_per_step, trained_by.rows_per_example),
            Pretrained(model, revision, dtype, attn_implementation, chat_template, chat_template_kwargs),
            ExampleEvaluation(eval_samples),
            gradient_checkpointing=gradient_checkpointing,
            sampler=sampler,
            max_tokens_per_micro_batch=max_tokens_per_micro_batch,
            seed=seed,
            quantization=quantization,
            optimizer=optimizer,
            lr_full=lr_full,
            lr_lora=lr_lora,
            schedule=schedule,
        )
        self.examples_per_step = examples_per_step
        self.rows_together = trained_by.rows_per_example
        self.shown_metrics = ("loss", *trained_by.shares_ahead)

    # ---- training data

    def rollout_loader(self, prompts: Sequence[Prompt]) -> RolloutLoader:
        """The train dataloader: optimizer steps of these examples. A data module's `train_dataloader` returns it."""
        self.check_enough(prompts)
        return super().rollout_loader(prompts)

    def roll_out(
        self, prompts: Sequence[Prompt], generator: torch.Generator, draw_more: DrawPrompts | None = None
    ) -> TrainedRollout:
        """Look up the completions of prompts (see `RolloutSource`). They have no rewards; their advantages are 1."""
        sequences = self.example_sequences(prompts, self.device)
        ones = torch.ones(len(sequences), device=self.device)
        return TrainedRollout(sequences, torch.zeros(sequences.completion_ids.shape, device=self.device), ones)

    def takes_part(self, advantages: Tensor) -> Tensor:
        """Every row is needed (see `RolloutSource`)."""
        return torch.ones_like(advantages, dtype=torch.bool)

    def add_logprobs(self, batches: Sequence[PolicyBatch], on_policy: bool) -> list[PolicyBatch]:
        """Fill in reference log-probabilities, where the loss compares with the start policy (see `RolloutSource`)."""
        if not self.loss.needs_reference:
            return list(batches)
        with self.stopping_together(), self.clock.phase("logprobs"):
            measured = self.update.measure([batch.sequences for batch in batches], current=False, as_trained=True)
        return [batch.with_logprobs(None, reference) for batch, (_, _, reference) in zip(batches, measured, strict=True)]

    def example_sequences(self, prompts: Sequence[Prompt], device: torch.device) -> Sequences:
        """Tokens of prompts and completions; the completions of a prompt are neighbouring rows.

        Raises:
            DataError: If a prompt has another number of completions than the loss needs, or is longer with one of them than the
                model can read.
        """
        rows = [self._example_tokens(prompt) for prompt in prompts]
        pad = pad_token(self.tokenizer)
        prompt_ids = [ids for ids, completions in rows for _ in completions]
        completion_ids = [ids for _, completions in rows for ids in completions]
        return Sequences(*pad_left(prompt_ids, pad, device), *pad_right(completion_ids, pad, device))

    def _example_tokens(self, prompt: Prompt) -> tuple[list[int], list[list[int]]]:
        """Token ids of a prompt, and of each of its completions."""
        if len(prompt.completions) != self.loss.rows_per_example:
            count, needed = len(prompt.completions), "one; give data.format=DemonstrationFormat"
            if self.loss.rows_per_example != 1:
                needed = "two, the chosen and the rejected one; give data.format=PreferenceFormat"
            raise DataError(f"{prompt.place} has {count} completions, but {type(self).__name__} needs {needed}")
        ids, encoder, stop_ids = self.encode(prompt), self.pretrained.encoder, self.pretrained.stop_ids
        completions = [encoder.encode_completion(prompt, text, stop_ids) for text in prompt.completions]
        longest = len(ids) + max(map(len, completions))
        limit = getattr(self.pretrained.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise DataError(
                f"{prompt.place} has {longest} tokens ({len(ids)} of the prompt), more than the {limit} that the model reads; "
                "shorten or remove the row, or drop long prompts by data.max_prompt_tokens (examples are never cut)"
            )
        return ids, completions

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Make sure that all examples can be trained on, and scored if there is a reward, before time is spent on the run."""
        if self.reward is not None:
            super().check_prompts(prompts)
        for prompt in prompts:
            self._example_tokens(prompt)

    def check_run_settings(self) -> None:
        """See `check_run`; the examples of a step are split evenly, and predictions scored, besides."""
        super().check_run_settings()
        if self.trainer.state.fn == "predict" and self.reward is None:
            raise ConfigError("predict scores completions; give model.reward, such as ExactMatch")
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
        """Log-probabilities with gradient and entropies of completions, [B, T] each, at temperature 1."""
        return self.weights.as_forward(lambda: token_logprobs(self.engine, sequences, 1.0))

    def chunk_loss(self, chunk: PolicyBatch, micro_batch_tokens: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a chunk of a micro-batch, as shares in those of the optimizer step (see `LanguageModule`)."""
        logprobs, entropy = self.logprobs(chunk.sequences)
        output = self.loss(replace(chunk.loss_inputs(logprobs), entropy=entropy.detach()))
        return output.loss, output.metrics

    def calibration_losses(
        self, num_prompts: int | None = None, kept: ScoringProgress | None = None, steps: int | None = None
    ) -> CalibrationLosses:
        """Losses whose mean gradient scores the modules: those of training examples under the start policy.

        Arguments are those of `LanguageModule`; nothing is kept, since nothing is made before the losses.

        Raises:
            ConfigError: If there are fewer training examples than one optimizer step takes.
        """
        prompts = training_prompts(self.trainer)
        self.check_enough(prompts)
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(self.calibration_seed)).tolist()
        count = min(self.examples_per_step if num_prompts is None else num_prompts, len(order))
        if steps is not None:
            count = steps * self.examples_per_step
        chosen = [prompts[order[i % len(order)]] for i in range(count)]
        parts = []
        for some in equal_slices(count, steps or 1):
            rows = self.example_sequences(chosen[some], self.model_device)
            ones = torch.ones(len(rows), device=self.model_device)
            chunks = [(rows.rows(chunk), ones[chunk]) for chunk in self.update.chunks(rows)]
            parts.append(TrainingCalibration("examples", rows, chunks, self.loss, self.calibration_logprobs))
        losses = parts[0] if steps is None else StepCalibration(parts)
        losses.info["prompts"] = len(chosen)
        return losses


class SupervisedModule(ExampleModule):
    """Supervised fine-tuning, on completions only.

    The data is a `PromptDataModule` whose format is a `DemonstrationFormat`. All weights are frozen when the model is loaded;
    `HybridAdapterSetup` scores the modules by the gradient of the supervised loss, and makes some weights trainable. The trained
    model can be exported, and a `PolicyModule` can start from it.

    Arguments and errors are those of `ExampleModule`.
    """

    default_loss = SupervisedLoss


class PreferenceModule(ExampleModule):
    """Preference alignment by a loss on pairs, such as DPO.

    The data is a `PromptDataModule` whose format is a `PreferenceFormat`. Chosen and rejected completion share the forward and
    backward pass of their prompt. The loss compares with the start policy, which is the model with its adapter switched off:
    there is no second model. `HybridAdapterSetup` scores the modules by the gradient of the loss at the start policy.

    Arguments and errors are those of `ExampleModule`.
    """

    default_loss = DPOLoss
