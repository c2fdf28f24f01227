"""`PolicyModule`: a causal language model that is trained on its own rollouts.

    prompts -> rollout -> rewards -> advantages -> PolicyBatch -> loss -> optimizer

The rollouts are made in the train dataloader (`RolloutLoader` asks `roll_out` and `add_logprobs`), so that `training_step` is a
pure loss on one micro-batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import AdamW

from hybrid_lightning.advantages import AdvantageEstimator, GroupAdvantage
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import ImportanceCorrection, PolicyLoss, TopEntropyMask
from hybrid_lightning.policy.calibrated import CalibratedModule
from hybrid_lightning.policy.evaluation import EvaluationMetrics
from hybrid_lightning.policy.group_advantages import advantages_over_ranks
from hybrid_lightning.policy.optim import LearningRateSchedule, OptimizerCallable
from hybrid_lightning.policy.quantization import Quantization
from hybrid_lightning.policy.rollout_metrics import rollout_metrics
from hybrid_lightning.policy.sampled_groups import choose_trained, sample_groups
from hybrid_lightning.policy.step_times import PhaseClock
from hybrid_lightning.rewards import RewardFunction
from hybrid_lightning.rollout.dynamic_sampling import DynamicSampling, teaching_groups
from hybrid_lightning.rollout.loader import DrawPrompts, RolloutSchedule
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.rollout.sampler import Sampler
from hybrid_lightning.sharding.ranks import world_size
from hybrid_lightning.types import Prompt, Rewards, Rollouts, Sequences

__all__ = ["PolicyModule"]


class PolicyModule(CalibratedModule):
    """Trains a language model by reinforcement learning with verifiable rewards.

    The model is frozen as loaded; `HybridAdapterSetup` makes part of it trainable.

    Args:
        loss: Policy loss, such as `GRPOLoss` or `GSPOLoss`.
        reward: Scores completions.
        model: `embedded`, a folder (also one with an adapter alone), a GGUF file, `package:NAME/FILE`, or a hub id.
        revision: Branch, tag or commit of a hub model.
        dtype: Weights in memory: `float32`, or `bfloat16` together with `trainer.precision=bf16-mixed` or `bf16-true`.
        quantization: Of the frozen base once the modules are scored, such as `NF4()`; None keeps it in `dtype`.
        attn_implementation: Such as `sdpa`, `eager`, `flash_attention_2`; None lets transformers choose.
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them.
        chat_template: Jinja template for chat prompts; None takes the tokenizer's own.
        chat_template_kwargs: Variables of the chat template.
        sampler: Decoding parameters; None takes `Sampler()`.
        advantage: Advantage estimator; None takes `GroupAdvantage()`.
        correction: Weighs the policy term where sampling and training probabilities differ, such as `TokenTruncation()`: in
            bfloat16, or with merged weights while sampling, if `sampling/logp_difference` is not small; None for none.
        token_mask: Gives a policy gradient to the most entropic tokens alone, such as `TopEntropyMask()`; None for all tokens.
        mask_truncated_completions: Whether completions that were cut at the sampler's `max_new_tokens` are left out of the loss
            (DAPO's overlong filtering). Their rewards still count in their group, and they in the number of sequences, but their
            tokens nowhere (as in TRL).
        dynamic_sampling: Replaces groups of completions that teach nothing, since all of them succeed or all fail, by those of
            further prompts, such as `DynamicSampling()`; None trains on all groups. Not used in scoring and evaluation.
        prompts_per_rollout: Prompts of a rollout, over all devices (P).
        samples_per_prompt: Completions of each prompt in a rollout (G).
        minibatches_per_rollout: Optimizer steps in one pass over a rollout.
        epochs_per_rollout: Passes over a rollout.
        max_tokens_per_micro_batch: Tokens of prompts and completions that one forward and backward pass takes, a prompt counted
            once for its completions. Smaller takes less memory for activations and gives the same gradient. None chooses by the
            sizes of the model (see `default_token_budget`).
        eval_samples: Completions per prompt in validation, test and predict (the n of avg@n), beside the greedy one.
        optimizer: Called with the parameter groups.
        lr_full: Learning rate of fully trained modules.
        lr_lora: Learning rate of LoRA weights, about 10 times `lr_full`.
        schedule: Learning rate schedule; None takes `ConstantSchedule()`.
        seed: Of prompt order, sampling and evaluation.

    Raises:
        ConfigError: If a value is impossible.
        ModelError: If the model cannot be loaded.
    """

    def __init__(
        self,
        loss: PolicyLoss,
        reward: RewardFunction,
        model: str = "embedded",
        revision: str | None = None,
        dtype: str = "float32",
        quantization: Quantization | None = None,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        sampler: Sampler | None = None,
        advantage: AdvantageEstimator | None = None,
        correction: ImportanceCorrection | None = None,
        token_mask: TopEntropyMask | None = None,
        mask_truncated_completions: bool = False,
        dynamic_sampling: DynamicSampling | None = None,
        prompts_per_rollout: int = 8,
        samples_per_prompt: int = 8,
        minibatches_per_rollout: int = 1,
        epochs_per_rollout: int = 1,
        max_tokens_per_micro_batch: int | None = None,
        eval_samples: int = 8,
        optimizer: OptimizerCallable = AdamW,
        lr_full: float = 1e-5,
        lr_lora: float = 1e-4,
        schedule: LearningRateSchedule | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._save_arguments()
        self.rollout_schedule = RolloutSchedule(
            prompts_per_rollout, samples_per_prompt, minibatches_per_rollout, epochs_per_rollout
        )
        if eval_samples < 1:
            raise ConfigError(f"model.eval_samples must be at least 1, got {eval_samples}")
        if dynamic_sampling is not None and samples_per_prompt < 2:
            raise ConfigError(
                f"model.samples_per_prompt={samples_per_prompt}: model.dynamic_sampling looks for prompts whose completions "
                "differ; set samples_per_prompt to 2 or more"
            )
        self.loss, self.reward = loss, reward
        self.sampler = sampler or Sampler()
        self.advantage = advantage or GroupAdvantage()
        self.correction, self.token_mask = correction, token_mask
        self.mask_truncated_completions, self.dynamic_sampling = mask_truncated_completions, dynamic_sampling
        self._warned_of_ties = self._warned_of_std = False
        self.eval_samples, self.seed = eval_samples, seed
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
        self.validation_metrics, self.test_metrics = EvaluationMetrics(eval_samples), EvaluationMetrics(eval_samples)
        self.last_rollout: tuple[Rollouts, Rewards, Tensor] | None = None  # for callbacks that show samples
        self.clock = PhaseClock()  # StepTimer gives its own

    # ---- training data

    def roll_out(
        self, prompts: Sequence[Prompt], generator: torch.Generator, draw_more: DrawPrompts | None = None
    ) -> tuple[Sequences, Tensor, Tensor, dict[str, float]]:
        """Complete and score prompts (see `RolloutSource`); metrics are those of all completions, trained on or not."""
        if self.dynamic_sampling is not None:
            return self._roll_out_dynamically(self.dynamic_sampling, prompts, generator, draw_more)
        rollouts, rewards = self._complete(prompts, generator)
        with self.clock.phase("reward"):
            advantages = advantages_over_ranks(self.advantage, rewards, rollouts.samples_per_prompt)
        self.last_rollout = (rollouts, rewards, advantages)
        taught = self.trained_sequences(rollouts)
        if len(taught) and not taught.completion_mask.any():
            rank_zero_warn(
                f"all {len(taught)} completions of a rollout were cut at max_new_tokens={self.sampler.max_new_tokens}, and "
                "model.mask_truncated_completions leaves those out, so that nothing is learned from it; raise "
                "model.sampler.max_new_tokens"
            )
        return taught, rollouts.sampling_logprobs, advantages, rollout_metrics(rollouts, rewards)

    def _complete(self, prompts: Sequence[Prompt], generator: torch.Generator) -> tuple[Rollouts, Rewards]:
        with self.stopping_together(), self.clock.phase("generate"):
            # So that a prompt is completed alike however many ranks there are.
            seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
            places = range(self.global_rank, len(prompts) * world_size(), world_size())
            samples = self.rollout_schedule.samples_per_prompt
            rollouts = self.generate(prompts, samples, PromptDraws(prompts, samples, seed, places))
        with self.stopping_together(), self.clock.phase("reward"):
            rewards = self.score(rollouts)
        return rollouts, rewards

    def _roll_out_dynamically(
        self, rule: DynamicSampling, prompts: Sequence[Prompt], generator: torch.Generator, draw_more: DrawPrompts | None
    ) -> tuple[Sequences, Tensor, Tensor, dict[str, float]]:
        groups = sample_groups(rule, prompts, draw_more, lambda some: self._complete(some, generator), self._teaching_groups)
        with self.clock.phase("reward"):
            minibatches = self.rollout_schedule.minibatches_per_rollout
            taught = self.trained_sequences(groups.rollouts)
            trained = choose_trained(groups, taught, self.advantage, minibatches, self.global_rank)
        self.last_rollout = (groups.rollouts, groups.rewards, trained.of_sampled)
        metrics = {**rollout_metrics(groups.rollouts, groups.rewards), **groups.metrics()}
        if metrics["sampling/filled_groups"] and draw_more is not None and not self._warned_of_ties:
            self._warned_of_ties = True
            rank_zero_warn(
                f"{metrics['sampling/filled_groups']:.0%} of a rollout's groups teach nothing, although {groups.extra_rollouts} "
                "extra rollouts looked for others: the prompts are too easy or too hard for the policy; give other data, or "
                "raise model.samples_per_prompt or model.dynamic_sampling.max_extra_rollouts. Later rollouts say so as "
                "sampling/filled_groups alone"
            )
        return trained.sequences, trained.sampling_logprobs, trained.advantages, metrics

    def _teaching_groups(self, rollouts: Rollouts, rewards: Rewards) -> Tensor:
        correctness = [rewards.parts[term.name] for term, _ in self.reward.terms() if term.measures_correctness]
        taught = self.trained_sequences(rollouts).completion_mask.any(dim=1)
        return teaching_groups(rewards.total, correctness, taught, rollouts.samples_per_prompt)

    def check_settings(self) -> None:
        """Called before scoring and before training.

        Raises:
            ConfigError: For the reasons of `LanguageModule`, or if a prompt has too few completions to compare, a reward does
                not go with the sampler's length, or a rollout cannot be split into the micro-batches that the Trainer asks for.
        """
        super().check_settings()
        self.advantage.check_samples(self.rollout_schedule.samples_per_prompt)
        for term, _ in self.reward.terms():
            term.check_length(self.sampler.max_new_tokens)
        if self.trainer.state.fn == "fit":
            self._warn_of_std()
            self.rollout_schedule.check_split(self.trainer.accumulate_grad_batches, self.trainer.world_size)

    def _warn_of_std(self) -> None:
        if self.advantage.divides_by_group_std and not self.loss.takes_group_std and not self._warned_of_std:
            self._warned_of_std = True  # these checks come several times
            rank_zero_warn(
                f"{type(self.loss).__name__} is meant for advantages that are not divided by the standard deviation of their "
                f"group, as those of {type(self.advantage).__name__} are; give --model.advantage=GroupMeanAdvantage"
            )
