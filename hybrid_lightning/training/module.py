"""`PolicyModule`: a causal language model that is trained on its own rollouts.

    prompts -> rollout -> rewards -> advantages -> PolicyBatch -> loss -> optimizer

The rollouts are made in the train dataloader, so that `training_step` is a pure loss on one micro-batch. `language.py` shows in
which order the methods here are called: `roll_out`, `takes_part` and `add_logprobs` by the dataloader, then `chunk_loss`. What is
done to one rollout is in `sampled_groups.py`, and to one micro-batch in `token_weights.py`.

Axes: P prompts, G samples per prompt, B sequences, T completion tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import AdamW

from hybrid_lightning.adapters.scoring_progress import ScoringProgress
from hybrid_lightning.advantages import AdvantageEstimator, GroupAdvantage
from hybrid_lightning.engine import default_token_budget, token_logprobs
from hybrid_lightning.environments import Environment, EpisodeLimits
from hybrid_lightning.episodes.episodes import Episodes, episode_metrics, token_advantages
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import ImportanceCorrection, PolicyLoss, TopEntropyMask
from hybrid_lightning.losses import functional as F
from hybrid_lightning.losses.shares import share
from hybrid_lightning.model.pretrained import Pretrained
from hybrid_lightning.model.quantization import Quantization
from hybrid_lightning.options import ACCURACY, MADE_BY, SIZES, Option
from hybrid_lightning.rewards import EpisodeReturn, RewardFunction, rewards_to_go
from hybrid_lightning.rollout.dynamic_sampling import DynamicSampling, useful_groups
from hybrid_lightning.rollout.loader import DrawPrompts, RolloutSchedule, TrainedRollout
from hybrid_lightning.rollout.prompt_order import PromptOrder
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.rollout.rollout_engine import Begun, RolloutEngine
from hybrid_lightning.sharding.ranks import world_size
from hybrid_lightning.training.calibration import (
    AnswerCalibration,
    CalibrationLosses,
    RewardCalibration,
    StepCalibration,
    calibration_rollouts,
    equal_slices,
)
from hybrid_lightning.training.evaluation import Evaluation, repeat_prompts
from hybrid_lightning.training.language import LanguageModule
from hybrid_lightning.training.optim import LearningRateSchedule, OptimizerCallable
from hybrid_lightning.training.run_checks import check_ahead
from hybrid_lightning.training.sampled_groups import (
    ROLLOUT_METRICS,
    advantages_over_ranks,
    choose_trained,
    rollout_metrics,
    sample_groups,
)
from hybrid_lightning.training.token_weights import compare_with_sampler, mask_tokens, versions_of_rows
from hybrid_lightning.training.training_data import training_prompts
from hybrid_lightning.types import PolicyBatch, Prompt, Rewards, Rollouts, ScoredRollout, Sequences
from hybrid_lightning.user_code import in_user_code

__all__ = ["PolicyModule"]

# First parts of the names of what policy losses measure, and `chunk_loss` beside them.
POLICY_METRICS = frozenset({"cispo_clip_ratio", "clip_ratio", "entropy", "kl", "ratio", "sampling", "top_entropy"})


class PolicyModule(LanguageModule):
    """Trains a language model by reinforcement learning with verifiable rewards.

    All weights are frozen when the model is loaded; `HybridAdapterSetup` makes some of them trainable. `last_rollout` has the
    completions, rewards and advantages of the last rollout (see `ScoredRollout`), or None before the first.

    Args:
        loss: Policy loss, such as `GRPOLoss` or `GSPOLoss`.
        reward: Scores completions; None, with an environment, takes `EpisodeReturn()`: the rewards that it gives.
        environment: What the policy acts in over several turns, such as `ToolEnvironment` or `GuessNumber`; None: a completion is
            one message.
        episodes: Bounds of an episode, and how environments run; None takes `EpisodeLimits()`. A message of the policy has at
            most `sampler.max_new_tokens`.
        turn_template: How an added message is written behind a prompt that is plain text, with `{content}` in place of its text;
            chat prompts are written by the chat template.
        advantage: Advantage estimator; None takes `GroupAdvantage()`.
        credit: What the tokens of an episode have their advantage from: `episode`, its whole reward, or `turn`, the rewards of
            their own turn and later ones (see the head of `hybrid_lightning.advantages`).
        correction: Weighs the policy term where sampling and training probabilities differ, such as `TokenTruncation()`. It is
            for bfloat16, or weights that are merged while sampling, if `sampling/logp_difference` is not small. None weighs
            nothing.
        token_mask: Restricts the policy gradient to the tokens of highest entropy, such as `TopEntropyMask()`; None for all
            tokens.
        mask_truncated_completions: Whether completions that were cut at the sampler's `max_new_tokens` are left out of the loss
            (DAPO's overlong filtering). As in TRL, their rewards still count in their group, and they still count in the number
            of sequences, but their tokens count nowhere.
        dynamic_sampling: Replaces groups whose completions all succeed or all fail, with advantages of 0, by groups of further
            prompts, such as `DynamicSampling()`; None trains on all groups. Not used in scoring and evaluation.
        prompts_per_rollout: Prompts of a rollout, over all devices (P).
        samples_per_prompt: Completions of each prompt in a rollout (G).
        minibatches_per_rollout: Optimizer steps in one pass over a rollout.
        epochs_per_rollout: Passes over a rollout.
        rollouts_ahead: How many rollouts before its training a rollout is begun (k), with the weights of that moment. With
            `VLLMServerSampler` completions are made while the policy is trained; with `Sampler` the same schedule is computed in
            turns. The policy that samples is then k rollouts behind (`sampling/weights_version_lag`), from which learning
            suffers: with clipped ratios 0 to 3 points at k = 1, four to five at 4 on the embedded task, and `SAPOLoss` and
            `CISPOLoss` fall apart; see docs/how-to/vllm.md.
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
        ConfigError: If a value is impossible.
        ModelError: If the model cannot be loaded.
    """

    training_metrics = LanguageModule.training_metrics | ROLLOUT_METRICS | POLICY_METRICS
    OPTIONS: ClassVar[dict[str, Option]] = {
        "advantage": Option(MADE_BY, scores=True),
        "credit": Option(MADE_BY, scores=True),
        "environment": Option(MADE_BY | ACCURACY, scores=True),
        "episodes": Option(MADE_BY | ACCURACY, scores=True),
        "turn_template": Option(MADE_BY | ACCURACY, scores=True),
        "correction": Option(MADE_BY),
        "token_mask": Option(MADE_BY),
        "mask_truncated_completions": Option(MADE_BY, scores=True),
        "dynamic_sampling": Option(MADE_BY),
        "prompts_per_rollout": Option(SIZES, scores=True),
        "samples_per_prompt": Option(MADE_BY, scores=True),
        "minibatches_per_rollout": Option(SIZES, updates=True),
        "epochs_per_rollout": Option(SIZES),
        "rollouts_ahead": Option(),
    }

    def __init__(
        self,
        loss: PolicyLoss,
        reward: RewardFunction | None = None,
        *,
        environment: Environment | None = None,
        episodes: EpisodeLimits | None = None,
        turn_template: str | None = None,
        advantage: AdvantageEstimator | None = None,
        credit: Literal["episode", "turn"] = "episode",
        correction: ImportanceCorrection | None = None,
        token_mask: TopEntropyMask | None = None,
        mask_truncated_completions: bool = False,
        dynamic_sampling: DynamicSampling | None = None,
        prompts_per_rollout: int = 8,
        samples_per_prompt: int = 8,
        minibatches_per_rollout: int = 1,
        epochs_per_rollout: int = 1,
        rollouts_ahead: int = 0,
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
        if dynamic_sampling is not None and samples_per_prompt < 2:
            raise ConfigError(
                f"model.samples_per_prompt={samples_per_prompt}: model.dynamic_sampling looks for prompts whose completions "
                "differ; set samples_per_prompt to 2 or more"
            )
        if reward is None and environment is None:
            raise ConfigError("model.reward is missing; give a reward, such as MathMatch, or an environment that gives rewards")
        for name, value in (("episodes", episodes), ("turn_template", turn_template)):
            if value is not None and environment is None:
                raise ConfigError(f"model.{name} is for episodes, and model.environment is not set; set it, or remove {name}")
        if credit not in ("episode", "turn"):
            raise ConfigError(f"model.credit={credit!r}; give episode or turn")
        if credit == "turn":
            if environment is None:
                raise ConfigError(
                    "model.credit=turn is for episodes, and model.environment is not set; set it, or credit=episode"
                )
            loss.check_token_advantages()
        super().__init__(
            loss,
            reward or EpisodeReturn(),
            RolloutSchedule(prompts_per_rollout, samples_per_prompt, minibatches_per_rollout, epochs_per_rollout, rollouts_ahead),
            Pretrained(model, revision, dtype, attn_implementation, chat_template, chat_template_kwargs),
            Evaluation(eval_samples),
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
        if environment is not None:
            limits, turn_rewards = episodes or EpisodeLimits(), credit == "turn"
            self.episodes = Episodes(environment, limits, self.sampler, self.pretrained, turn_template, turn_rewards)
        self.sampler.requests_go_on = self.sampler.completes_elsewhere and rollouts_ahead > 1
        if rollouts_ahead and self.sampler.completes_elsewhere:
            self.shown_metrics = (*self.shown_metrics, "sampling/waited_s", "sampling/engine_idle_s")
        self.advantage, self.credit = advantage or GroupAdvantage(), credit
        self.correction, self.token_mask = correction, token_mask
        self.mask_truncated_completions, self.dynamic_sampling = mask_truncated_completions, dynamic_sampling
        self._warned_of_filled_groups = self._warned_of_unread_rewards = False
        self.last_rollout: ScoredRollout | None = None  # of this process; None before the first
        self.last_calibration: tuple[Rollouts, Rewards] | None = None  # of the rank that made it, for callbacks

    # ---- training data

    def roll_out(
        self, prompts: Sequence[Prompt], generator: torch.Generator, draw_more: DrawPrompts | None = None
    ) -> TrainedRollout:
        """Complete and score prompts (see `RolloutSource`). The metrics are of all completions, trained on or not."""
        if self.dynamic_sampling is not None:
            return self._roll_out_dynamically(self.dynamic_sampling, prompts, generator, draw_more)
        return self._to_train(*self._begin(prompts, generator).finish())

    def begin(
        self, prompts: Sequence[Prompt], generator: torch.Generator, draw_more: DrawPrompts | None = None
    ) -> Begun[TrainedRollout]:
        """See `RolloutSource`: an engine that completes elsewhere goes on with it while the policy is trained."""
        if not self.sampler.completes_elsewhere or self.rollout_schedule.rollouts_ahead == 0:
            return super().begin(prompts, generator, draw_more)
        begun = self._begin(prompts, generator)
        return Begun(lambda: self._to_train(*begun.finish()), begun.wait, begun.cancel)

    def _begin(self, prompts: Sequence[Prompt], generator: torch.Generator) -> Begun[tuple[Rollouts, Rewards]]:
        """Begin to complete this rank's prompts of a rollout, and to score what arrives."""
        # Random numbers by position in the rollout: a prompt is completed alike however many ranks there are.
        seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
        places = range(self.global_rank, len(prompts) * world_size(), world_size())
        samples = self.rollout_schedule.samples_per_prompt
        draws = PromptDraws(prompts, samples, seed, places)
        with self.stopping_together(), self.clock.phase("generate"):
            self.generation.update(ahead=True)
            arriving = self.arriving(prompts, samples)
            if self.sampler.completes_elsewhere:
                begun = self.generation.begin(prompts, samples, draws, ahead=True, on_completion=arriving.on_completion)
            else:
                begun = Begun(lambda: self.generate(prompts, samples, draws, on_completion=arriving.on_completion))

        def finish() -> tuple[Rollouts, Rewards]:
            try:
                with self.stopping_together(), self.clock.phase("generate"):
                    rollouts = begun.finish()
                with self.stopping_together(), self.clock.phase("reward"):
                    return rollouts, self.score(rollouts, arriving)
            except BaseException:
                arriving.cancel()
                raise

        def wait() -> None:
            with self.stopping_together(), self.clock.phase("generate"):
                begun.wait()

        def cancel() -> None:
            arriving.cancel()
            begun.cancel()

        return Begun(finish, wait, cancel)

    def _to_train(self, rollouts: Rollouts, rewards: Rewards) -> TrainedRollout:
        """This rank's part of a rollout with its advantages, which are estimated over all ranks."""
        self.sampler.release_memory()
        with self.clock.phase("reward"):
            credited = self.credited(rollouts, rewards)
            of_turns = advantages_over_ranks(self.advantage, credited, rollouts.samples_per_prompt)
            advantages = token_advantages(of_turns, rollouts)
        trained = self.trained_sequences(rollouts, rewards)
        count = len(rewards.of_counted().total)
        if count and not trained.sampled_mask.any():
            rank_zero_warn(
                f"all {count} completions of a rollout were cut at max_new_tokens={self.sampler.max_new_tokens}, and "
                "model.mask_truncated_completions leaves those out, so that nothing is learned from it; raise "
                "model.sampler.max_new_tokens"
            )
        metrics = self._measured(rollouts, rewards, credited, advantages)
        return TrainedRollout(trained, rollouts.sampling_logprobs, advantages, metrics, rewards.counted)

    def _roll_out_dynamically(
        self, rule: DynamicSampling, prompts: Sequence[Prompt], generator: torch.Generator, draw_more: DrawPrompts | None
    ) -> TrainedRollout:
        """`roll_out` with extra rollouts, by a rule, in place of groups from which nothing is learned."""
        groups = sample_groups(rule, prompts, draw_more, lambda some: self._begin(some, generator).finish(), self._useful_groups)
        self.sampler.release_memory()
        with self.clock.phase("reward"):
            minibatches = self.rollout_schedule.minibatches_per_rollout
            sequences = self.trained_sequences(groups.rollouts, groups.rewards)
            credited = self.credited(groups.rollouts, groups.rewards)
            trained, of_sampled = choose_trained(groups, sequences, self.advantage, minibatches, self.global_rank, credited)
        metrics = self._measured(groups.rollouts, groups.rewards, credited, of_sampled) | groups.metrics()
        if metrics["sampling/filled_groups"] and draw_more is not None and not self._warned_of_filled_groups:
            self._warned_of_filled_groups = True
            rank_zero_warn(
                f"nothing is learned from {metrics['sampling/filled_groups']:.0%} of a rollout's groups, although "
                f"{groups.extra_rollouts} extra rollouts looked for others: the prompts are too easy or too hard for the policy; "
                "give other data, or raise model.samples_per_prompt or model.dynamic_sampling.max_extra_rollouts. Later rollouts "
                "say so as sampling/filled_groups alone"
            )
        return replace(trained, metrics=metrics)

    def credited(self, rollouts: Rollouts, rewards: Rewards) -> Rewards:
        """The rewards that advantages are estimated from: those of the episodes, or of each of their turns (`rewards_to_go`)."""
        if self.credit == "episode":
            return rewards
        assert self.episodes is not None and self.reward is not None, "checked by the constructor"
        prompts = repeat_prompts(rollouts.prompts, rollouts.samples_per_prompt)
        return rewards_to_go(self.reward, rollouts.completions, prompts, rewards, self.episodes.limits.max_turns)

    def _measured(self, rollouts: Rollouts, rewards: Rewards, credited: Rewards, advantages: Tensor) -> dict[str, float]:
        """Metrics of a rollout over all ranks. It is kept as `last_rollout`, with the mean advantage over a sequence's tokens."""
        if advantages.dim() == 2:
            advantages = F.sequence_means(advantages, rollouts.sequences.sampled_mask)
        self.last_rollout = ScoredRollout(rollouts, rewards, advantages)
        metrics = {**rollout_metrics(rollouts, rewards, credited), **self.generation.metrics()}
        if self.episodes is None:
            return metrics
        metrics |= episode_metrics(rollouts.completions)
        unread = metrics.get("episodes/return") and not any(isinstance(term, EpisodeReturn) for term in self.reward_terms())
        if unread and not self._warned_of_unread_rewards:
            self._warned_of_unread_rewards = True
            rank_zero_warn(
                f"{type(self.episodes.environment).__name__} gives rewards, and model.reward does not read them; add "
                "EpisodeReturn to it, or leave model.reward out to train on them alone"
            )
        return metrics

    def _useful_groups(self, rollouts: Rollouts, rewards: Rewards) -> Tensor:
        """Which of this rank's groups something is learned from, one bool for each."""
        trained, rewards = self.trained_sequences(rollouts, rewards).sampled_mask.any(dim=1), self.credited(rollouts, rewards)
        correctness = [rewards.parts[term.name] for term in self.reward_terms() if term.measures_correctness]
        turns = len(rewards.total) // len(trained)
        of_turns = useful_groups(rewards.total, correctness, trained.repeat(turns), rollouts.samples_per_prompt, rewards.counted)
        return of_turns.view(turns, -1).any(dim=0)

    def trained_sequences(self, rollouts: Rollouts, rewards: Rewards) -> Sequences:
        """The sequences as the loss sees them: without tokens where completions do not count, or were cut and are masked."""
        sequences = rollouts.sequences if rewards.counted is None else rollouts.sequences.without(~rewards.counted)
        return sequences.without(~rollouts.finished) if self.mask_truncated_completions else sequences

    def takes_part(self, advantages: Tensor) -> Tensor:
        """The rows that an update needs (see `RolloutSource`): those with an advantage, or all if the loss needs the others."""
        return F.any_advantage(advantages) | (not self.loss.ignores_zero_advantage)

    def add_logprobs(self, batches: Sequence[PolicyBatch], on_policy: bool) -> list[PolicyBatch]:
        """Fill in old and reference log-probabilities and the token mask, where they are needed (see `RolloutSource`).

        Old log-probabilities are computed as in training, not taken from the sampler: the ratio of the first minibatch is then
        exactly 1, which GSPO's narrow clip range needs. With rollouts ahead, whose sampler had earlier weights, they are those of
        the policy before the rollout's first step, and the correction weighs how far that is from the sampler (decoupled PPO,
        arXiv 2110.00641); without a correction they are the sampler's.
        """
        mask, of_sampler = self.token_mask, self._old_of_sampler
        on_policy = on_policy and not of_sampler
        if of_sampler:
            batches = [replace(batch, old_logprobs=batch.sampling_logprobs) for batch in batches]
        if (on_policy or of_sampler) and not self.loss.needs_reference and mask is None:
            return list(batches)
        with self.stopping_together(), self.clock.phase("logprobs"):
            sequences = [batch.sequences for batch in batches]
            current = mask is not None or not (on_policy or of_sampler)
            measured = self.update.measure(sequences, current=current, as_trained=True)
        filled = [
            batch.with_logprobs(batch.old_logprobs if of_sampler else None if on_policy else old, reference)
            for batch, (old, _, reference) in zip(batches, measured, strict=True)
        ]
        return filled if mask is None else mask_tokens(filled, [entropy for _, entropy, _ in measured], mask)

    @property
    def _old_of_sampler(self) -> bool:
        """Whether the loss compares with the policy that sampled by the sampler's own log-probabilities."""
        return self.rollout_schedule.rollouts_ahead > 0 and self.correction is None

    # ---- loss

    def logprobs(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [B, T] at the sampler's temperature; entropies with gradient if the loss needs it."""
        with_gradient = self.loss.needs_entropy
        return self.weights.as_forward(lambda: token_logprobs(self.engine, sequences, self.sampler.temperature, with_gradient))

    def chunk_loss(self, chunk: PolicyBatch, micro_batch_tokens: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a chunk of a micro-batch, as shares in those of the optimizer step (see `LanguageModule`)."""
        logprobs, entropy = self.logprobs(chunk.sequences)
        inputs, metrics = compare_with_sampler(chunk, logprobs, self.correction, self._old_of_sampler)
        made_by = chunk.sequences.weights_step
        assert made_by is not None, "all rows were sampled"
        metrics["sampling/weights_version_lag"] = share((self.trainer.global_step - made_by).float(), inputs)
        if self.sampler.requests_go_on:
            metrics["sampling/weights_versions"] = share(versions_of_rows(made_by, inputs.sampled_mask), inputs)
        inputs = replace(
            inputs,
            entropy=entropy,
            max_completion_tokens=float(self.max_completion_tokens),
            micro_batch_tokens=micro_batch_tokens,
            num_micro_batches=float(self.trainer.accumulate_grad_batches * self.trainer.world_size),
        )
        metrics["entropy"] = share(entropy.detach(), inputs)
        if chunk.policy_mask is not None:
            metrics["top_entropy/share"] = share(chunk.policy_mask.to(entropy.dtype), inputs)
        output = self.loss(inputs)
        return output.loss, {**output.metrics, **metrics}

    # ---- checks and scoring

    def check_run_settings(self) -> None:
        """See `check_run`; the advantage needs enough completions, and a rollout is split into micro-batches, besides."""
        super().check_run_settings()
        sampler, loss, advantage = self.sampler, type(self.loss).__name__, type(self.advantage).__name__
        if self.correction is not None and sampler.renormalizes and not sampler.keeps_all_tokens:
            raise ConfigError(
                f"model.correction={type(self.correction).__name__} compares probabilities under the full softmax, and with "
                f"{type(sampler).__name__} and top_p, top_k or min_p they are those among the tokens that are kept, which "
                "training does not know; set sampler.top_p=1, top_k=0 and min_p=0, or model.correction=null, or take Sampler"
            )
        self.advantage.check_samples(self.rollout_schedule.samples_per_prompt)
        for term in self.reward_terms():
            with in_user_code(term, "check_length"):
                term.check_length(self.max_completion_tokens)
        if self.trainer.state.fn != "fit":
            return
        self.rollout_schedule.check_split(self.trainer.accumulate_grad_batches, self.trainer.world_size)
        check_ahead(self)
        if self.is_loaded and self.advantage.divides_by_group_std and not self.loss.takes_group_std:
            rank_zero_warn(
                f"{loss} is meant for advantages that are not divided by the standard deviation of their group, as those of "
                f"{advantage} are; give --model.advantage=GroupMeanAdvantage"
            )
        if self.is_loaded and sampler.has_own_weights and self.correction is None:
            rank_zero_warn(
                "vLLM computes slightly other probabilities than training, and model.correction corrects nothing: see "
                "sampling/logp_difference, and give --model.correction=TokenTruncation, as configs/rollout/vllm.yaml does"
            )

    def calibration_losses(
        self, num_prompts: int | None = None, kept: ScoringProgress | None = None, steps: int | None = None
    ) -> CalibrationLosses:
        """Losses whose mean gradient scores the modules: those of rollouts of the start policy on training prompts.

        Where all rewards are equal they have no gradient. The supervised losses of reference answers are then used, if the data
        has answers. Arguments are those of `LanguageModule`.

        Raises:
            ConfigError: If there are too few training prompts, or all completions are masked.
            CalibrationError: If all rewards are equal and there are no answers.
        """
        prompts = training_prompts(self.trainer)
        self.check_enough(prompts)
        order = PromptOrder(prompts, seed=0).of(self.calibration_seed)
        schedule = self.rollout_schedule
        count = min(schedule.prompts_per_rollout if num_prompts is None else num_prompts, len(order))
        minibatches = 1
        if steps is not None:
            needed = -(-steps // schedule.minibatches_per_rollout)  # rollouts
            count, minibatches = needed * schedule.prompts_per_rollout, needed * schedule.minibatches_per_rollout
        chosen = [prompts[order[i % len(order)]] for i in range(count)]
        rollouts, rewards = self.last_calibration = calibration_rollouts(self, chosen, kept or ScoringProgress())
        self.sampler.release_memory()
        credited = self.credited(rollouts, rewards)
        advantages = token_advantages(self.advantage.of_rewards(credited, rollouts.samples_per_prompt), rollouts)
        sequences, counted = self.trained_sequences(rollouts, rewards), rewards.counted
        if not sequences.sampled_mask.any():
            raise ConfigError(
                f"all {len(sequences)} calibration completions were cut at max_new_tokens={self.sampler.max_new_tokens}, and "
                "model.mask_truncated_completions leaves those out of the loss, so that nothing would be learned; raise "
                "model.sampler.max_new_tokens, or set model.mask_truncated_completions=false"
            )
        # Not that of training, beside whose state less fits; and of the model's device, to which the policy goes only later.
        device = self.model_device
        max_tokens = self.max_tokens_per_micro_batch or default_token_budget(self.model, device)
        parts: list[CalibrationLosses] = []
        if bool(advantages[sequences.sampled_mask.any(dim=1)].any()):
            longest = self.max_completion_tokens
            for rows in equal_slices(len(sequences), minibatches)[:steps]:
                step, weights, of_step = sequences.rows(rows), advantages[rows], None if counted is None else counted[rows]
                parts.append(RewardCalibration(step, weights, self.loss, self.calibration_logprobs, max_tokens, longest, of_step))
        else:
            device = sequences.completion_ids.device
            for rows in equal_slices(len(chosen), min(minibatches, len(chosen)))[:steps]:
                ids = [self.encode(prompt) for prompt in chosen[rows]]
                parts.append(AnswerCalibration(chosen[rows], ids, self.tokenizer, self.calibration_logprobs, max_tokens, device))
        losses = parts[0] if steps is None else StepCalibration(parts)
        losses.info["prompts"] = len(chosen)
        return losses
