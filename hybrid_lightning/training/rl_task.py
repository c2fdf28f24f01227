"""`RLTask`: reinforcement learning with verifiable rewards, the main loop of this project.

    prompts -> Rollout, with rewards, then advantages -> PolicyBatch -> loss -> optimizer

The methods are in call order: `RolloutLoader` draws prompts, calls `roll_out`, splits the result into micro-batches and calls
`add_logprobs`; `OptimizerStep` calls `chunk_loss`. Parts of them are in `generation.py` (prompts to rewards),
`sampled_groups.py` (groups over ranks, dynamic sampling) and `token_weights.py` (weights of tokens in the loss).

Axes: P prompts, G episodes per prompt, B rows, T completion tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from hybrid_lightning.advantages import AdvantageEstimator
from hybrid_lightning.episodes.episodes import episode_metrics, token_advantages
from hybrid_lightning.losses import Distillation, ImportanceCorrection, PolicyLoss, TopEntropyMask
from hybrid_lightning.losses import functional as F
from hybrid_lightning.losses.shares import share
from hybrid_lightning.rewards import rewards_to_go
from hybrid_lightning.rollout.dynamic_sampling import DynamicSampling, useful_groups
from hybrid_lightning.rollout.future import RolloutFuture
from hybrid_lightning.rollout.loader import DrawPrompts
from hybrid_lightning.rollout.prompt_order import PromptOrder
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.training import run_checks
from hybrid_lightning.training.calibration import CalibrationLosses, calibration_rollout, rollout_losses
from hybrid_lightning.training.generation import repeat_prompts
from hybrid_lightning.training.sampled_groups import (
    ROLLOUT_METRICS,
    policy_batch,
    rollout_metrics,
    rows_to_train,
    sample_groups,
    unfilled,
    with_advantages,
)
from hybrid_lightning.training.task import Task
from hybrid_lightning.training.teachers import Teacher
from hybrid_lightning.training.teaching import Teaching
from hybrid_lightning.training.token_weights import compare_with_sampler, mask_tokens, sampling_metrics, versions_of_rows
from hybrid_lightning.types import PolicyBatch, Prompt, Rewards, Rollout, Sequences


class RLTask(Task):
    """Trains a policy on its own rollouts. See `PolicyModule` for the arguments, and `Task` for the shared arguments.

    Attributes:
        last_calibration: Rollout of `calibration_losses`, on the rank that made it; None before that.
    """

    loss: PolicyLoss
    training_metrics = Task.training_metrics | ROLLOUT_METRICS  # first parts of names; the next are of losses and `chunk_loss`
    training_metrics |= {"cispo_clip_ratio", "clip_ratio", "entropy", "kl", "off_policy", "ratio", "teacher", "top_entropy"}

    def __init__(
        self,
        *shared: Any,
        advantage: AdvantageEstimator,
        credit: Literal["episode", "turn"] = "episode",
        correction: ImportanceCorrection | None = None,
        token_mask: TopEntropyMask | None = None,
        mask_truncated_completions: bool = False,
        dynamic_sampling: DynamicSampling | None = None,
        teacher: Teacher | None = None,
        distillation: Distillation | None = None,
    ) -> None:
        super().__init__(*shared)
        self.advantage, self.credit, self.correction, self.token_mask = advantage, credit, correction, token_mask
        self.mask_truncated_completions, self.dynamic_sampling = mask_truncated_completions, dynamic_sampling
        self.last_calibration: Rollout | None = None
        run_checks.check_distillation(teacher, distillation, advantage, dynamic_sampling, self.loss)
        self.teaching = Teaching(self.passes, self.generation, teacher, distillation)
        self.shown_metrics = ("reward", "completions/mean_length", *self.teaching.shown_metrics)  # beside the progress bar
        if self.schedule.rollouts_ahead and self.generation.sampler.is_remote:
            self.shown_metrics += ("sampling/waited_s", "sampling/engine_idle_s")
        self.needs_start_policy |= self.teaching.needs_start_policy
        run_checks.check_credit(credit, self.generation, self.loss)

    # ---- prompts -> rollout -> rewards

    def roll_out(
        self, prompts: Sequence[Prompt], generator: torch.Generator, draw_more: DrawPrompts | None = None
    ) -> RolloutFuture[PolicyBatch]:
        """Begin to complete and score prompts. The metrics cover all completions, even those that are not trained on."""
        self.teaching.begin()
        rollout = self._sample(prompts, generator)
        if (rule := self.dynamic_sampling) is not None:
            more = lambda some: self._sample(some, generator).result()  # noqa: E731
            whole = sample_groups(rule, rollout.result(), draw_more, more, self._useful_groups)
            if draw_more is not None and (warning := unfilled(whole.metrics)):
                self.run.warn_once(warning, "filled groups")
            rollout = RolloutFuture.of(whole)
        batch = rollout.then(self._to_train)
        if rule is not None or (self.schedule.rollouts_ahead and not self.generation.sampler.is_remote):
            batch.result()  # now, since the weights change before it is trained on
        return batch

    def _sample(self, prompts: Sequence[Prompt], generator: torch.Generator) -> RolloutFuture[Rollout]:
        # Random numbers depend on the position in the rollout: a prompt has the same completions for any number of ranks.
        seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
        places = range(self.run.rank, len(prompts) * self.run.world_size, self.run.world_size)
        samples = self.schedule.samples_per_prompt
        return self.generation.begin_scored(prompts, samples, PromptDraws(prompts, samples, seed, places), self.teaching.listen)

    # ---- rewards -> advantages -> rows to train on

    def _to_train(self, rollout: Rollout) -> PolicyBatch:
        """This rank's rows to train on, with advantages, which are estimated over all ranks."""
        self.generation.sampler.release_memory()
        wanted, credited = self.schedule.prompts_per_rollout, self.credited(rollout)
        with self.run.clock.phase("reward"):
            rollout = with_advantages(rollout, credited, self.advantage, wanted)
        sequences = self.trained_sequences(rollout)
        run_checks.warn_if_all_are_cut(sequences, rollout, self.generation)
        rollout = replace(rollout, metrics=self._measure(rollout, credited) | rollout.metrics)
        rollout, seen = self.teaching.teach(rollout, sequences)
        return rows_to_train(rollout, sequences, wanted, self.schedule.minibatches_per_rollout, self.run.rank, seen)

    def credited(self, rollout: Rollout) -> Rewards:
        """The rewards that advantages are estimated from: per episode, or per turn (`rewards_to_go`)."""
        if self.credit == "episode":
            return rollout.scored
        assert self.generation.episodes is not None and self.reward is not None, "checked before"
        prompts, turns = repeat_prompts(rollout.prompts, rollout.group_size), self.generation.episodes.limits.max_turns
        return rewards_to_go(self.reward, rollout.completions, prompts, rollout.scored, turns)

    def trained_sequences(self, rollout: Rollout) -> Sequences:
        """The rows as the loss sees them: episodes that do not count, or are cut and masked, have no tokens."""
        sequences, counted = rollout.sequences, rollout.scored.counted
        if counted is not None:
            sequences = sequences.without(rollout.of_rows(~counted))
        return sequences.without(rollout.of_rows(rollout.cut)) if self.mask_truncated_completions else sequences

    def _useful_groups(self, rollout: Rollout) -> Tensor:
        """Which of this rank's groups give a learning signal, one bool per group."""
        trained = rollout.sum_rows(self.trained_sequences(rollout).sampled_mask.sum(dim=1)) > 0
        rewards = self.credited(rollout)
        paid, terms = rewards.weights, self.generation.reward_terms()
        correctness = [term.name for term in terms if term.measures_correctness and paid.get(term.name, 1.0)]
        return useful_groups(rewards, correctness, trained)

    @property
    def needs_all_rows(self) -> bool:  # type: ignore[override]
        """Whether an update needs rows without advantage, too: for the loss or a teacher."""
        return self.teaching.needs_all_rows or not self.loss.ignores_zero_advantage

    def _measure(self, rollout: Rollout, credited: Rewards) -> dict[str, float]:
        """Metrics of a rollout over all ranks."""
        metrics = {**rollout_metrics(rollout, credited), **self.generation.metrics(), **self.generation.reward_counts()}
        if self.generation.episodes is not None:
            metrics |= episode_metrics(rollout.completions)
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
        logprobs, entropy, divergence, measured = self.teaching.predict(chunk)
        difference, weights = compare_with_sampler(chunk, logprobs, self.correction, self._old_of_sampler)
        inputs = chunk.loss_inputs(
            logprobs,
            None if weights is None else F.per_token(weights, chunk.sequences.sampled_mask),
            entropy=entropy,
            divergence=divergence,
            max_completion_tokens=float(self.generation.max_completion_tokens),
            micro_batch_tokens=micro_batch_tokens,
            num_micro_batches=float(self.run.accumulate_grad_batches * self.run.world_size),
        )
        metrics = sampling_metrics(difference, weights, inputs)
        made_by = cast(Tensor, chunk.sequences.weights_step)  # all rows were sampled
        metrics["sampling/weights_version_lag"] = share((self.run.step - made_by).float(), inputs)
        if self.generation.sampler.inflight_updates:
            metrics["sampling/weights_versions"] = share(versions_of_rows(made_by, inputs.sampled_mask), inputs)
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
        rollout = calibration_rollout(self.generation, chosen, self.schedule, self.calibration_seed)
        self.generation.sampler.release_memory()
        rollout = replace(rollout, advantages=self.advantage.of_rewards(self.credited(rollout)))
        rollout = replace(rollout, token_advantages=token_advantages(rollout))
        self.last_calibration = rollout
        sequences = self.trained_sequences(rollout)
        rollout = self.teaching.teach_calibration(rollout, sequences, self.loss)
        batch, most = policy_batch(rollout, sequences), self.passes.current_token_budget()
        return rollout_losses(batch, chosen, self.loss, self.generation, self.calibration_logprobs, most)

    def check_training_prompts(self, prompts: Sequence[Prompt]) -> None:
        """See `Task`."""
        super().check_training_prompts(prompts)
        self.teaching.check_prompts(prompts)

    def check(self) -> None:
        """Raise ConfigError if settings do not work with rollouts, rewards or advantages, and warn of doubtful ones."""
        self.teaching.check()
        run_checks.check_rl(self.schedule, self.generation, self.loss, self.advantage, self.correction, self.dynamic_sampling)
