"""`RLTask`: what reinforcement learning with verifiable rewards needs besides its loop (`loop.py`).

Options, credit, the rows that a loss sees, metrics, calibration for the scoring of modules, and checks.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from hybrid_lightning.episodes.episodes import episode_metrics, token_advantages
from hybrid_lightning.losses import PolicyLoss
from hybrid_lightning.model.passes import Passes
from hybrid_lightning.rewards import rewards_to_go
from hybrid_lightning.rollout.dynamic_sampling import useful_groups
from hybrid_lightning.rollout.loader import RolloutSchedule
from hybrid_lightning.rollout.prompt_order import PromptOrder
from hybrid_lightning.training import run_checks
from hybrid_lightning.training.calibration import CalibrationLosses, calibration_rollout, rollout_losses
from hybrid_lightning.training.evaluation import Evaluation
from hybrid_lightning.training.generation import Generation, repeat_prompts
from hybrid_lightning.training.options import RLOptions
from hybrid_lightning.training.sampled_groups import ROLLOUT_METRICS, policy_batch, rollout_metrics, unfilled
from hybrid_lightning.training.task import Task
from hybrid_lightning.training.teaching import Teaching
from hybrid_lightning.types import Prompt, Rewards, Rollout, Sequences


class RLTask(Task):
    """A policy that learns from its own rollouts. See `RLOptions` for the options, and `Task` for the other arguments.

    Attributes:
        last_calibration: Rollout of `calibration_losses`, on the rank that made it; None before that.
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
        self.options = options
        self.last_calibration: Rollout | None = None
        self.teaching = Teaching(self.passes, self.generation, options.teacher, options.distillation)
        self.shown_metrics = ("reward", "completions/mean_length", *self.teaching.shown_metrics)  # beside the progress bar
        if self.schedule.rollouts_ahead and self.plays_elsewhere:
            self.shown_metrics += ("sampling/waited_s", "sampling/engine_idle_s")
        self.needs_start_policy |= self.teaching.needs_start_policy

    # ---- parts of the loop

    def credit(self, rollout: Rollout) -> Rewards:
        """The rewards that advantages are estimated from: per episode, or per turn (`rewards_to_go`)."""
        if self.options.credit == "episode":
            return rollout.scored
        assert self.generation.episodes is not None and self.reward is not None, "checked before"
        prompts, turns = repeat_prompts(rollout.prompts, rollout.group_size), self.generation.episodes.limits.max_turns
        return rewards_to_go(self.reward, rollout.completions, prompts, rollout.scored, turns)

    def rows_of_loss(self, rollout: Rollout) -> Sequences:
        """The rows as the loss sees them: episodes that do not count, or are cut and masked, have no tokens."""
        sequences, counted = rollout.sequences, rollout.scored.counted
        if counted is not None:
            sequences = sequences.without(rollout.of_rows(~counted))
        return sequences.without(rollout.of_rows(rollout.cut)) if self.options.mask_truncated_completions else sequences

    def useful_groups(self, rollout: Rollout) -> Tensor:
        """Which of this rank's groups give a learning signal, one bool per group."""
        trained = rollout.sum_rows(self.rows_of_loss(rollout).sampled_mask.sum(dim=1)) > 0
        rewards = self.credit(rollout)
        paid, terms = rewards.weights, self.generation.reward_terms()
        correctness = [term.name for term in terms if term.measures_correctness and paid.get(term.name, 1.0)]
        return useful_groups(rewards, correctness, trained)

    @property
    def plays_elsewhere(self) -> bool:  # type: ignore[override]
        """Whether rollouts that were begun are made while this process continues."""
        return self.generation.sampler.is_remote

    @property
    def needs_all_rows(self) -> bool:  # type: ignore[override]
        """Whether an update needs rows without advantage, too: for the loss or a teacher."""
        return self.teaching.needs_all_rows or not self.loss.ignores_zero_advantage

    @property
    def old_of_sampler(self) -> bool:
        """Whether the loss uses the sampler's log-probabilities as the old ones."""
        return self.schedule.rollouts_ahead > 0 and self.options.correction is None

    def measure(self, rollout: Rollout, credited: Rewards, sequences: Sequences) -> dict[str, float]:
        """Metrics of a rollout over all ranks; warns of a rollout from which nothing can be learned."""
        run_checks.warn_if_all_are_cut(sequences, rollout, self.generation)
        if warning := unfilled(rollout.metrics):
            self.run.warn_once(warning, "filled groups")
        metrics = {**rollout_metrics(rollout, credited), **self.generation.metrics(), **self.generation.reward_counts()}
        if self.generation.episodes is not None:
            metrics |= episode_metrics(rollout.completions)
            if warning := run_checks.unread_rewards(self.generation, metrics):
                self.run.warn_once(warning, "unread rewards")
        return metrics

    # ---- scoring of modules, and checks

    def calibration_losses(self, prompts: Sequence[Prompt], count: int | None = None) -> CalibrationLosses:
        """Losses of rollouts of the start policy on `count` of these prompts; None for the number in one rollout."""
        self.check_enough(prompts)
        order = PromptOrder(prompts, seed=0).of(self.calibration_seed)
        chosen = [prompts[place] for place in order[: self.schedule.prompts_per_rollout if count is None else count]]
        rollout = calibration_rollout(self.generation, chosen, self.schedule, self.calibration_seed)
        self.generation.sampler.release_memory()
        rollout = replace(rollout, advantages=self.options.advantage.of_rewards(self.credit(rollout)))
        rollout = replace(rollout, token_advantages=token_advantages(rollout))
        self.last_calibration = rollout
        sequences = self.rows_of_loss(rollout)
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
        run_checks.check_rl(self.options, self.schedule, self.generation, self.loss)
