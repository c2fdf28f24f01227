"""`ExampleTask`: training on completions in the data: demonstrations, or preferences between two completions.

    examples -> PolicyBatch -> loss -> optimizer

A step works as in reinforcement learning, but a "rollout" is looked up, not sampled: each prompt comes with its completions
(`Prompt.completions`), and one rollout is one optimizer step. An example that is too long for the model raises an error; examples
are never cut.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hybrid_lightning.errors import ConfigError, DataError
from hybrid_lightning.losses import ExampleLoss
from hybrid_lightning.model.passes import Passes
from hybrid_lightning.model.policy import Policy
from hybrid_lightning.rollout.batching import pad_left, pad_right, pad_token
from hybrid_lightning.rollout.interface import Begun
from hybrid_lightning.rollout.loader import DrawPrompts, RolloutSchedule
from hybrid_lightning.training.calibration import CalibrationLosses, training_losses
from hybrid_lightning.training.evaluation import ExampleEvaluation
from hybrid_lightning.training.generation import Generation
from hybrid_lightning.training.task import Task
from hybrid_lightning.types import PolicyBatch, Prompt, Sequences


class ExampleTask(Task):
    """Trains a policy with a loss on examples.

    Args:
        loss: Loss on examples.
        examples_per_step: Examples (pairs, for a loss on pairs) in an optimizer step, over all devices and micro-batches.
        generation: Completes and scores held-out prompts, if it has a reward.
        max_tokens: Most tokens in a pass; None for an automatic choice.
        eval_samples: Sampled completions per prompt in an evaluation.
        seed: Seed of the order of the data and of sampling.

    Raises:
        ConfigError: If a value is invalid.
    """

    loss: ExampleLoss
    training_metrics = Task.training_metrics | {"entropy", "logps", "rewards"}  # metrics of losses on examples

    def __init__(
        self,
        loss: ExampleLoss,
        examples_per_step: int,
        generation: Generation,
        max_tokens: int | None,
        eval_samples: int,
        seed: int,
    ) -> None:
        if examples_per_step < 1:
            raise ConfigError(f"model.examples_per_step must be at least 1, got {examples_per_step}")
        rows = loss.rows_per_example
        passes = Passes(generation.policy, max_tokens=max_tokens, rows_per_example=rows)
        evaluation = ExampleEvaluation(generation, eval_samples, seed, loss, passes, self.sequences_of)
        super().__init__(loss, RolloutSchedule(examples_per_step, rows), generation, passes, evaluation, seed)
        self.shown_metrics = ("loss", *loss.shares_ahead)

    # ---- training

    def begin(
        self, prompts: Sequence[Prompt], generator: torch.Generator, draw_more: DrawPrompts | None = None
    ) -> Begun[PolicyBatch]:
        """Look up the completions of prompts. They have no rewards; their advantages are 1."""
        return Begun.of(self._batch(prompts))

    def finish(self, batch: PolicyBatch, number: int) -> list[PolicyBatch]:
        """See `RolloutSource`."""
        return self.minibatches(batch, number)

    def add_logprobs(self, batches: Sequence[PolicyBatch], on_policy: bool) -> list[PolicyBatch]:
        """Fill in reference log-probabilities, if the loss compares with the start policy."""
        if not self.loss.needs_reference:
            return list(batches)
        with self.run.stopping_together(), self.run.clock.phase("logprobs"):
            sequences = [batch.sequences for batch in batches]
            measured = self.passes.measure(sequences, current=False, reference=True, interruptible=self.run.interruptible)
        return [replace(batch, ref_logprobs=reference) for batch, (_, _, reference) in zip(batches, measured, strict=True)]

    def chunk_loss(self, chunk: PolicyBatch, micro_batch_tokens: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a chunk of a micro-batch, as shares of the optimizer step's loss and metrics."""
        logprobs, entropy = self.passes.logprobs(chunk.sequences)
        output = self.loss(chunk.loss_inputs(logprobs, entropy=entropy.detach()))
        return output.loss, output.metrics

    def calibration_losses(self, prompts: Sequence[Prompt], count: int | None = None) -> CalibrationLosses:
        """Losses of `count` training examples under the start policy; None for the number in one optimizer step.

        Raises:
            ConfigError: If there are fewer training examples than one optimizer step needs.
        """
        self.check_enough(prompts)
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(self.calibration_seed)).tolist()
        chosen = [prompts[place] for place in order[: self.schedule.prompts_per_rollout if count is None else count]]
        batch = self._batch(chosen)
        runs = self.passes.chunks(batch.sequences)
        losses = training_losses("examples", batch, slice(None), runs, self.loss, self.calibration_logprobs)
        losses.info["prompts"] = len(chosen)
        return losses

    # ---- examples as tokens

    def _batch(self, prompts: Sequence[Prompt]) -> PolicyBatch:
        sequences = self.sequences_of(prompts)
        device = sequences.completion_ids.device
        nothing, ones = torch.zeros(sequences.completion_ids.shape, device=device), torch.ones(len(sequences), device=device)
        return PolicyBatch(sequences, ones, nothing)

    def sequences_of(self, prompts: Sequence[Prompt]) -> Sequences:
        """Tokens of prompts and completions, on the policy's device; the completions of a prompt are in adjacent rows.

        Raises:
            DataError: If a prompt does not have the number of completions that the loss needs, or if a prompt with its completion
                is too long for the model.
        """
        rows = [self._tokens(prompt) for prompt in prompts]
        policy: Policy = self.policy
        pad, device = pad_token(policy.pretrained.tokenizer), policy.device
        prompt_ids = [ids for ids, completions in rows for _ in completions]
        completion_ids = [ids for _, completions in rows for ids in completions]
        return Sequences(*pad_left(prompt_ids, pad, device), *pad_right(completion_ids, pad, device))

    def _tokens(self, prompt: Prompt) -> tuple[list[int], list[list[int]]]:
        """Token ids of a prompt, and of each of its completions."""
        if len(prompt.completions) != self.loss.rows_per_example:
            count, needed = len(prompt.completions), "one; give data.format=DemonstrationFormat"
            if self.loss.rows_per_example != 1:
                needed = "two, the chosen and the rejected one; give data.format=PreferenceFormat"
            raise DataError(f"{prompt.place} has {count} completions, but {type(self.loss).__name__} needs {needed}")
        pretrained = self.policy.pretrained
        ids, encoder = self.generation.encode(prompt), pretrained.encoder
        completions = [encoder.encode_completion(prompt, text, pretrained.stop_ids) for text in prompt.completions]
        longest = len(ids) + max(map(len, completions))
        limit = getattr(pretrained.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise DataError(
                f"{prompt.place} has {longest} tokens ({len(ids)} in the prompt), more than the model's {limit} positions; "
                "shorten or remove the row, or set data.max_prompt_tokens to drop long prompts (examples are never cut)"
            )
        return ids, completions

    # ---- checks

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Check that all examples can be trained on, and scored if there is a reward, before time is spent on the run."""
        if self.reward is not None:
            super().check_prompts(prompts)
        for prompt in prompts:
            self._tokens(prompt)

    def check(self) -> None:
        """Raise ConfigError unless the examples of a step can be split evenly and predictions can be scored."""
        run, examples = self.run, self.schedule.prompts_per_rollout
        if run.stage == "predict" and self.reward is None:
            raise ConfigError("predict scores completions; give model.reward, such as ExactMatch")
        if run.stage == "fit" and examples % (run.world_size * run.accumulate_grad_batches):
            raise ConfigError(
                f"model.examples_per_step={examples} must be a multiple of the {run.world_size} devices x "
                f"trainer.accumulate_grad_batches={run.accumulate_grad_batches}; change one"
            )

    def check_enough(self, prompts: Sequence[Prompt]) -> None:
        """Raise ConfigError if there are fewer training examples than one optimizer step needs."""
        if len(prompts) < self.schedule.prompts_per_rollout:
            raise ConfigError(
                f"model.examples_per_step={self.schedule.prompts_per_rollout} is more than the {len(prompts)} training examples; "
                "lower it or give more data"
            )
