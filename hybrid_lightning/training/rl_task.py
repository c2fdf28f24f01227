"""`RLTask`: reinforcement learning with verifiable rewards, the main loop of this project.

    prompts -> rollout -> rewards -> advantages -> PolicyBatch -> loss -> optimizer

The methods are in call order: `RolloutLoader` draws prompts, calls `roll_out`, splits the result into micro-batches and calls
`add_logprobs`; `OptimizerStep` calls `chunk_loss`. Parts of them are in `generation.py` (prompts to rewards), `sampled_groups.py`
(groups over ranks, dynamic sampling) and `token_weights.py` (weights of tokens in the loss).

Axes: P prompts, G samples per prompt, B sequences, T completion tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from hybrid_lightning.episodes.episodes import episode_metrics, token_advantages
from hybrid_lightning.losses import PolicyLoss
from hybrid_lightning.losses import functional as F
from hybrid_lightning.losses.shares import share
from hybrid_lightning.model.passes import Passes
from hybrid_lightning.rewards import rewards_to_go
from hybrid_lightning.rollout.dynamic_sampling import DynamicSampling, useful_groups
from hybrid_lightning.rollout.future import RolloutFuture
from hybrid_lightning.rollout.loader import DrawPrompts, RolloutSchedule, TrainedRollout
from hybrid_lightning.rollout.prompt_order import PromptOrder
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.training import run_checks
from hybrid_lightning.training.calibration import CalibrationLosses, calibration_rollouts, rollout_losses
from hybrid_lightning.training.evaluation import Evaluation
from hybrid_lightning.training.generation import Generation, repeat_prompts
from hybrid_lightning.training.options import RLOptions
from hybrid_lightning.training.sampled_groups import (
    ROLLOUT_METRICS,
    advantages_over_ranks,
    choose_trained,
    rollout_metrics,
    sample_groups,
    with_advantages,
)
from hybrid_lightning.training.task import Task
from hybrid_lightning.training.teaching import Teaching
from hybrid_lightning.training.token_weights import compare_with_sampler, mask_tokens, versions_of_rows
from hybrid_lightning.types import PolicyBatch, Prompt, Rewards, Rollouts, Sequences


class RLTask(Task):
    """Trains a policy on its own rollouts. See `RLOptions` for the options, and `Task` for the other arguments.

    Attributes:
        last_calibration: Rollouts and rewards of `calibration_losses`, on the rank that made them; None before that.
    """

    loss: PolicyLoss
    training_metrics = Task.training_metrics | ROLLOUT_METRICS  # first parts of names; the next are of losses and `chunk_loss`
    training_metrics |= {"cispo_clip_ratio", "clip_ratio", "entropy", "kl", "off_policy", "ratio", "teacher", "top_entropy"}

    def __init__(
        self,
        loss: PolicyLoss,
        schedule: RolloutSchedule,
        generation: Generation,
        passes: Passes,
        evaluation: Evaluation,
        seed: int,
        options: RLOptions,
    ) -> None:
        super().__init__(loss, schedule, generation, passes, evaluation, seed)
        run_checks.check_options(options, generation, loss)
        self.options, self.advantage, self.credit = options, options.advantage, options.credit
        self.correction, self.token_mask, self.dynamic_sampling = options.correction, options.token_mask, options.dynamic_sampling
        self.mask_truncated_completions = options.mask_truncated_completions
        self.last_calibration: tuple[Rollouts, Rewards] | None = None
        self.teaching = Teaching(self.passes, self.generation, options.teacher, options.distillation)
        self.shown_metrics = ("reward", "completions/mean_length", *self.teaching.shown_metrics)  # beside the progress bar
        if self.schedule.rollouts_ahead and self.generation.sampler.is_remote:
            self.shown_metrics += ("sampling/waited_s", "sampling/engine_idle_s")
        self.needs_start_policy |= self.teaching.needs_start_policy

    # ---- prompts -> rollout -> rewards

    def roll_out(
        self, prompts: Sequence[Prompt], generator: torch.Generator, draw_more: DrawPrompts | None = None
    ) -> RolloutFuture[TrainedRollout]:
        """Begin to complete and score prompts. The metrics cover all completions, even those that are not trained on."""
        if self.dynamic_sampling is not None:
            return RolloutFuture.of(self._roll_out_dynamically(self.dynamic_sampling, prompts, generator, draw_more))
        self.teaching.begin()
        rollout = self._sample(prompts, generator).then(self._to_train)
        if self.schedule.rollouts_ahead and not self.generation.sampler.is_remote:
            rollout.result()  # now, since the weights change before it is trained on
        return rollout

    def _sample(self, prompts: Sequence[Prompt], generator: torch.Generator) -> RolloutFuture[tuple[Rollouts, Rewards]]:
        # Random numbers depend on the position in the rollout: a prompt has the same completions for any number of ranks.
        seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
        places = range(self.run.rank, len(prompts) * self.run.world_size, self.run.world_size)
        samples = self.schedule.samples_per_prompt
        return self.generation.begin_scored(prompts, samples, PromptDraws(prompts, samples, seed, places), self.teaching.listen)

    # ---- rewards -> advantages

    def _to_train(self, scored: tuple[Rollouts, Rewards]) -> TrainedRollout:
        """This rank's part of a rollout with its advantages, which are estimated over all ranks."""
        rollouts, rewards = scored
        self.generation.sampler.release_memory()
        with self.run.clock.phase("reward"):
            credited = self.credited(rollouts, rewards)
            of_turns = advantages_over_ranks(self.advantage, credited, rollouts.samples_per_prompt)
            advantages = token_advantages(of_turns, rollouts)
        trained = self.trained_sequences(rollouts, rewards)
        run_checks.warn_if_all_are_cut(trained, rewards, self.generation)
        metrics = self._measured(rollouts, rewards, credited)
        seen, advantages, of_teacher = self.teaching.taught(rollouts, trained, advantages)
        needed, shown = self._contributes(advantages), with_advantages(rollouts, rewards, advantages)
        logprobs, metrics = rollouts.sampling_logprobs, metrics | of_teacher
        return TrainedRollout(trained, logprobs, advantages, metrics, rewards.counted, needed, shown, seen)

    def _roll_out_dynamically(
        self, rule: DynamicSampling, prompts: Sequence[Prompt], generator: torch.Generator, draw_more: DrawPrompts | None
    ) -> TrainedRollout:
        """A rollout in which groups without a learning signal are replaced by groups from extra rollouts."""
        groups = sample_groups(rule, prompts, draw_more, lambda some: self._sample(some, generator).result(), self._useful_groups)
        self.generation.sampler.release_memory()
        with self.run.clock.phase("reward"):
            sequences = self.trained_sequences(groups.rollouts, groups.rewards)
            credited, minibatches = self.credited(groups.rollouts, groups.rewards), self.schedule.minibatches_per_rollout
            trained, of_sampled = choose_trained(groups, sequences, self.advantage, minibatches, self.run.rank, credited)
        metrics = self._measured(groups.rollouts, groups.rewards, credited) | groups.metrics()
        if draw_more is not None and (warning := groups.warning()):
            self.run.warn_once(warning, "filled groups")
        shown = with_advantages(groups.rollouts, groups.rewards, of_sampled)
        return replace(trained, metrics=metrics, contributes=self._contributes(trained.advantages), scored=shown)

    def credited(self, rollouts: Rollouts, rewards: Rewards) -> Rewards:
        """The rewards that advantages are estimated from: per episode, or per turn (`rewards_to_go`)."""
        if self.credit == "episode":
            return rewards
        assert self.generation.episodes is not None and self.reward is not None, "checked before"
        prompts = repeat_prompts(rollouts.prompts, rollouts.samples_per_prompt)
        return rewards_to_go(self.reward, rollouts.completions, prompts, rewards, self.generation.episodes.limits.max_turns)

    def trained_sequences(self, rollouts: Rollouts, rewards: Rewards) -> Sequences:
        """The sequences as the loss sees them: completions that do not count, or are cut and masked, have no tokens."""
        sequences = rollouts.sequences if rewards.counted is None else rollouts.sequences.without(~rewards.counted)
        return sequences.without(rollouts.cut) if self.mask_truncated_completions else sequences

    def _useful_groups(self, rollouts: Rollouts, rewards: Rewards) -> Tensor:
        """Which of this rank's groups give a learning signal, one bool per group."""
        trained, rewards = self.trained_sequences(rollouts, rewards).sampled_mask.any(dim=1), self.credited(rollouts, rewards)
        paid, terms = rewards.weights, self.generation.reward_terms()
        correctness = [rewards.parts[term.name] for term in terms if term.measures_correctness and paid.get(term.name, 1.0)]
        turns = len(rewards.total) // len(trained)
        of_turns = useful_groups(rewards.total, correctness, trained.repeat(turns), rollouts.samples_per_prompt, rewards.counted)
        return of_turns.view(turns, -1).any(dim=0)

    def _contributes(self, advantages: Tensor) -> Tensor:
        """The rows that an update needs: rows with an advantage, or all rows if the loss or a teacher needs the others."""
        return F.any_advantage(advantages) | (self.teaching.needs_all_rows or not self.loss.ignores_zero_advantage)

    def _measured(self, rollouts: Rollouts, rewards: Rewards, credited: Rewards) -> dict[str, float]:
        """Metrics of a rollout over all ranks."""
        metrics = {**rollout_metrics(rollouts, rewards, credited), **self.generation.metrics(), **self.generation.reward_counts()}
        if self.generation.episodes is not None:
            metrics |= episode_metrics(rollouts.completions)
            if warning := run_checks.unread_rewards(self.generation, metrics):
                self.run.warn_once(warning, "unread rewards")
        return metrics

    # ---- advantages -> PolicyBatch, with log-probabilities

    def add_logprobs(self, batches: Sequence[PolicyBatch], on_policy: bool) -> list[PolicyBatch]:
        """Fill in old and reference log-probabilities and the token mask, if they are needed.

        Old log-probabilities are computed as in training, not taken from the sampler, so the ratio of the first minibatch is
        exactly 1, which GSPO's narrow clip range needs. With rollouts ahead, the sampler had earlier weights. The old
        log-probabilities are then the policy's before the rollout's first step, and the correction weights tokens by their
        distance to the sampler's (decoupled PPO, arXiv 2110.00641). Without a correction, they are the sampler's.
        """
        mask, of_sampler, reference = self.token_mask, self._old_of_sampler, self.loss.needs_reference
        if of_sampler:
            batches = [replace(batch, old_logprobs=batch.sampling_logprobs) for batch in batches]
        current = mask is not None or not (on_policy or of_sampler)
        if not current and not reference:
            return list(batches)
        with self.run.stopping_together(), self.run.clock.phase("logprobs"):
            sequences = [batch.sequences for batch in batches]
            measured = self.passes.measure(sequences, current, reference, self.run.interruptible)
        filled = [
            replace(batch, old_logprobs=batch.old_logprobs if of_sampler else None if on_policy else old, ref_logprobs=start)
            for batch, (old, _, start) in zip(batches, measured, strict=True)
        ]
        return filled if mask is None else mask_tokens(filled, [entropy for _, entropy, _ in measured], mask)

    @property
    def _old_of_sampler(self) -> bool:
        """Whether the loss uses the sampler's log-probabilities as the old ones."""
        return self.schedule.rollouts_ahead > 0 and self.correction is None

    # ---- PolicyBatch -> loss

    def chunk_loss(self, chunk: PolicyBatch, micro_batch_tokens: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a chunk of a micro-batch, as shares of the optimizer step's loss and metrics."""
        logprobs, entropy, divergence, measured = self.teaching.learned(chunk)
        inputs, metrics = compare_with_sampler(chunk, logprobs, self.correction, self._old_of_sampler)
        made_by = cast(Tensor, chunk.sequences.weights_step)  # all rows were sampled
        metrics["sampling/weights_version_lag"] = share((self.run.step - made_by).float(), inputs)
        if self.generation.sampler.inflight_updates:
            metrics["sampling/weights_versions"] = share(versions_of_rows(made_by, inputs.sampled_mask), inputs)
        micro_batches = float(self.run.accumulate_grad_batches * self.run.world_size)
        longest = float(self.generation.max_completion_tokens)
        inputs = replace(inputs, entropy=entropy, divergence=divergence, max_completion_tokens=longest)
        inputs = replace(inputs, micro_batch_tokens=micro_batch_tokens, num_micro_batches=micro_batches)
        metrics |= {name: share(values, inputs) for name, values in measured.items()}
        if chunk.policy_mask is not None:
            metrics["top_entropy/share"] = share(chunk.policy_mask.to(entropy.dtype), inputs)
        output = self.loss(inputs)
        return output.loss, {**output.metrics, **metrics}

    # ---- scoring of modules, and checks

    def calibration_losses(self, prompts: Sequence[Prompt], count: int | None = None) -> CalibrationLosses:
        """Losses of rollouts of the start policy on `count` of these prompts; None for the number in one rollout."""
        self.check_enough(prompts)
        order = PromptOrder(prompts, seed=0).of(self.calibration_seed)
        chosen = [prompts[place] for place in order[: self.schedule.prompts_per_rollout if count is None else count]]
        rollouts, rewards = calibration_rollouts(self.generation, chosen, self.schedule, self.calibration_seed)
        self.last_calibration = rollouts, rewards
        self.generation.sampler.release_memory()
        advantages = self.advantage.of_rewards(self.credited(rollouts, rewards), rollouts.samples_per_prompt)
        sequences = self.trained_sequences(rollouts, rewards)
        of_tokens, most = token_advantages(advantages, rollouts), self.passes.current_token_budget()
        of_tokens = self.teaching.calibrated(rollouts, sequences, of_tokens, self.loss)
        logprobs, counted = self.calibration_logprobs, rewards.counted
        return rollout_losses(chosen, sequences, of_tokens, counted, self.loss, self.generation, logprobs, most)

    def check_training_prompts(self, prompts: Sequence[Prompt]) -> None:
        """See `Task`."""
        super().check_training_prompts(prompts)
        self.teaching.check_prompts(prompts)

    def check(self) -> None:
        """Raise ConfigError if settings do not work with rollouts, rewards or advantages, and warn of doubtful ones."""
        self.teaching.check()
        run_checks.check_rl(self.options, self.schedule, self.generation, self.loss)
