"""`ExampleModule`: a policy that is trained on completions that the data has, instead of its own.

    examples -> PolicyBatch -> loss -> optimizer

All is as for a policy that samples (`RolloutLoader`, micro-batches, packed rows in which a prompt is shared by its completions,
denominators of the whole optimizer step), but that a "rollout" is looked up: each prompt comes with its completions
(`Prompt.completions`), and one rollout is one optimizer step. Examples are complete or an error: none is cut.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from hybrid_lightning.engine import token_logprobs
from hybrid_lightning.errors import ConfigError, DataError
from hybrid_lightning.losses import ExampleLoss
from hybrid_lightning.policy.evaluation import EvaluationMetrics
from hybrid_lightning.policy.example_calibration import ExampleCalibration
from hybrid_lightning.policy.example_evaluation import EvaluatedExamples
from hybrid_lightning.policy.example_metrics import ExampleMetrics
from hybrid_lightning.policy.optim import LearningRateSchedule, OptimizerCallable
from hybrid_lightning.policy.quantization import Quantization
from hybrid_lightning.policy.step_times import PhaseClock
from hybrid_lightning.rewards import RewardFunction
from hybrid_lightning.rollout.batching import pad_left, pad_right
from hybrid_lightning.rollout.loader import DrawPrompts, RolloutLoader, RolloutSchedule
from hybrid_lightning.rollout.sampler import Sampler
from hybrid_lightning.types import PolicyBatch, Prompt, Sequences


class ExampleModule(EvaluatedExamples):
    """Training and held-out loss on examples; a subclass says which loss is meant and what an example has to look like.

    Args:
        loss: Loss of examples; None takes the class's own (`default_loss`).
        model: `embedded`, a folder, a GGUF file, `package:NAME/FILE`, or a hub id.
        revision: Branch, tag or commit of a hub model.
        dtype: Weights in memory: `float32`, or `bfloat16` together with `trainer.precision=bf16-mixed` or `bf16-true`.
        quantization: Of the frozen base once the modules are scored, such as `NF4()`; None keeps it in `dtype`.
        attn_implementation: Such as `sdpa`, `eager`, `flash_attention_2`; None lets transformers choose.
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them.
        chat_template: Jinja template for chat prompts; None takes the tokenizer's own.
        chat_template_kwargs: Variables of the chat template.
        examples_per_step: Examples (of a loss of pairs: pairs) of an optimizer step, over all devices and micro-batches.
        max_tokens_per_micro_batch: Tokens that one forward and backward pass takes, which changes memory and not the gradient.
            None chooses by the sizes of the model (see `default_token_budget`).
        reward: Scores completions of held-out prompts; validation and test then generate, too. None measures the loss alone.
        sampler: Decoding parameters of that evaluation; None takes `Sampler()`.
        eval_samples: Completions per prompt in that evaluation (the n of avg@n), beside the greedy one.
        optimizer: Called with the parameter groups.
        lr_full: Learning rate of fully trained modules.
        lr_lora: Learning rate of LoRA weights, about 10 times `lr_full`.
        schedule: Learning rate schedule; None takes `ConstantSchedule()`.
        seed: Of the order of examples and of the evaluation.

    Raises:
        ConfigError: If a value is impossible.
        ModelError: If the model cannot be loaded.
    """

    default_loss: type[ExampleLoss]
    examples_per_step: int
    completions_wanted: str  # how an example has to look, for error messages

    def __init__(
        self,
        loss: ExampleLoss | None = None,
        model: str = "embedded",
        revision: str | None = None,
        dtype: str = "float32",
        quantization: Quantization | None = None,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        examples_per_step: int = 32,
        max_tokens_per_micro_batch: int | None = None,
        reward: RewardFunction | None = None,
        sampler: Sampler | None = None,
        eval_samples: int = 8,
        optimizer: OptimizerCallable = AdamW,
        lr_full: float = 1e-5,
        lr_lora: float = 1e-4,
        schedule: LearningRateSchedule | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._save_arguments()
        self._set_examples(loss or self.default_loss(), reward, sampler, examples_per_step, eval_samples, seed)
        self._train_with(optimizer, lr_full, lr_lora, schedule, max_tokens_per_micro_batch)
        self._load(
            model,
            revision,
            dtype,
            quantization,
            attn_implementation,
            gradient_checkpointing,
            chat_template,
            chat_template_kwargs,
        )

    def _set_examples(
        self,
        loss: ExampleLoss,
        reward: RewardFunction | None,
        sampler: Sampler | None,
        examples_per_step: int,
        eval_samples: int,
        seed: int,
    ) -> None:
        for name, value in (("examples_per_step", examples_per_step), ("eval_samples", eval_samples)):
            if value < 1:
                raise ConfigError(f"model.{name} must be at least 1, got {value}")
        self.loss, self.reward, self.sampler = loss, reward, sampler or Sampler()
        self.examples_per_step, self.eval_samples, self.seed = examples_per_step, eval_samples, seed
        self.rows_together = loss.rows_per_example
        self.rollout_schedule = RolloutSchedule(examples_per_step, loss.rows_per_example)
        self.example_metrics = torch.nn.ModuleDict({"val": ExampleMetrics(), "test": ExampleMetrics()})
        self.validation_metrics, self.test_metrics = EvaluationMetrics(eval_samples), EvaluationMetrics(eval_samples)
        self.clock = PhaseClock()  # StepTimer gives its own

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
                return batch.with_logprobs(None, self._constant_logprobs(batch.sequences)[0])

        def add_all() -> list[PolicyBatch]:
            with self.signals.at_once():
                return [add(batch) for batch in batches]

        with self.stopping_together(), self.clock.phase("logprobs"), self._inference():
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
        said = [self.encoder.encode_completion(prompt, text, self.stop_ids) for text in prompt.completions]
        longest = len(asked) + max(map(len, said))
        limit = getattr(self.model_config.get_text_config(), "max_position_embeddings", None)
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

    def _train_prompts(self) -> list[Prompt]:
        prompts = super()._train_prompts()
        self.check_enough(prompts)
        return prompts

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

    def _run(self, batch: PolicyBatch, micro_batch_tokens: float) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs, entropy = self.logprobs(batch.sequences)
        output = self.loss(replace(batch.loss_inputs(logprobs), entropy=entropy.detach()))
        return output.loss, output.metrics

    def calibration_losses(self, num_prompts: int | None = None) -> ExampleCalibration:
        """Losses whose mean gradient scores the modules: the training loss of training examples under the start policy.

        Args:
            num_prompts: Training examples to use; fewer if there are not as many. None: as many as one optimizer step has.

        Raises:
            ConfigError: If there are no training examples.
        """
        prompts = self._train_prompts()
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(self.seed + 7919)).tolist()
        chosen = [prompts[i] for i in order[: num_prompts or self.examples_per_step]]
        # Not self.device: the callback has moved the model, and Lightning moves this module only after the setup hooks.
        sequences = self.example_sequences(chosen, next(self.model.parameters()).device)
        losses = ExampleCalibration(sequences, self._runs(sequences), self.loss, self._calibration_logprobs)
        losses.info["prompts"] = len(chosen)
        return losses

    def _calibration_logprobs(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        with self._precision():
            return self.logprobs(sequences)
