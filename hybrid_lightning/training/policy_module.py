"""`PolicyModule`: a language model that trains on its own rollouts, with `RLLoop`."""

from typing import Any, Literal

from hybrid_lightning.advantages import AdvantageEstimator, GroupAdvantage
from hybrid_lightning.agents.agent import AnyAgent, as_agent
from hybrid_lightning.environments import Environment, EpisodeLimits
from hybrid_lightning.episodes.episodes import Episodes
from hybrid_lightning.losses import Distillation, ImportanceCorrection, PolicyLoss, TopEntropyMask
from hybrid_lightning.model.passes import Passes
from hybrid_lightning.rewards import EpisodeReturn
from hybrid_lightning.rewards.combined import AnyReward, as_reward
from hybrid_lightning.rollout.dynamic_sampling import DynamicSampling
from hybrid_lightning.rollout.loader import RolloutSchedule
from hybrid_lightning.training.engine_generation import generation_of
from hybrid_lightning.training.evaluation import Evaluation
from hybrid_lightning.training.loop import RLLoop
from hybrid_lightning.training.module import LanguageModule
from hybrid_lightning.training.options import RLOptions, TaskParts
from hybrid_lightning.training.teachers import Teacher

__all__ = ["PolicyModule"]


class PolicyModule(LanguageModule):
    """Trains a language model by reinforcement learning with verifiable rewards.

    All weights are frozen when the model is loaded; `HybridAdapterSetup` makes some of them trainable. Callbacks find the
    completions, rewards and advantages of a rollout in its micro-batches (see `Rollout` in `hybrid_lightning.types`).

    Args:
        loss: Policy loss, such as `GRPOLoss` or `GSPOLoss`.
        reward: Scores completions. In Python also a function (see `FunctionReward`), or a list of rewards and functions, which
            are added up. With an environment or an agent, None stands for `EpisodeReturn()`: the rewards that these give.
        environment: The environment that the policy acts in over several turns, such as `ToolEnvironment` or `GuessNumber`; None
            if a completion is a single message.
        agent: A program that talks to the policy over an OpenAI-compatible endpoint, in place of an environment: `FunctionAgent`
            or `CommandAgent`. In Python also a function of a row and a client.
        episodes: Limits of an episode, and how environments run; None for `EpisodeLimits()`. Each message of the policy has at
            most `sampler.max_new_tokens`.
        turn_template: How to write a message of an environment or an agent after a plain-text prompt, with `{content}` in place
            of its text. Chat prompts use the chat template instead.
        advantage: Advantage estimator; None for `GroupAdvantage()`.
        credit: Reward that determines the advantage of an episode's tokens: `episode` for its whole reward, `turn` for the
            rewards of the token's own turn and later turns (see the head of `hybrid_lightning.advantages`).
        correction: Weights the policy term by how much sampling and training probabilities differ, such as `TokenTruncation()`.
            Use it with bfloat16, or with weights that are merged while sampling, if `sampling/logp_difference` is not small. None
            for no weights.
        token_mask: Restricts the policy gradient to the tokens of highest entropy, such as `TopEntropyMask()`; None for all
            tokens.
        mask_truncated_completions: Whether the loss leaves out completions that a token limit cut (DAPO's overlong filtering).
            The limits are `sampler.max_new_tokens` and, for an episode, `episodes.max_tokens`, but not its turns or time. As in
            TRL, such completions still count in their group's rewards and in the number of sequences; their tokens count nowhere.
        dynamic_sampling: Replaces groups without a learning signal, in which all completions succeed or all fail, by groups of
            further prompts, such as `DynamicSampling()`; None to train on all groups. Not used in scoring and evaluation.
        teacher: A better policy that rates the sampled tokens: `ModelTeacher`, `SelfTeacher` or `ServerTeacher`. The policy
            learns from it in addition to the reward or, with `advantage=NoAdvantage`, instead of it. None for no teacher.
        distillation: How to learn from the teacher; None for `SampledReverseKL()`.
        prompts_per_rollout: Prompts in a rollout, over all devices (P).
        samples_per_prompt: Completions of each prompt in a rollout (G).
        minibatches_per_rollout: Optimizer steps in one pass over a rollout.
        epochs_per_rollout: Passes over a rollout.
        rollouts_ahead: Number of rollouts (k) that are sampled ahead of training, with the weights at that time. With
            `VLLMServerSampler`, completions are made while the policy trains; `Sampler` follows the same schedule in turns. The
            sampling policy is then k rollouts old (`sampling/weights_version_lag`), which harms learning. On the embedded task,
            losses with clipped ratios lose 0 to 3 points of accuracy at k = 1 and 4 to 5 points at k = 4. `SAPOLoss` collapses
            from k = 1 on, and `CISPOLoss` from k = 2; see docs/how-to/rollouts-ahead.md.
        options: Options of `LanguageModule`.

    Raises:
        ConfigError: If a value is invalid.
        ModelError: If the model cannot be found.
    """

    task: RLLoop

    def __init__(
        self,
        loss: PolicyLoss,
        reward: AnyReward | None = None,
        *,
        environment: Environment | None = None,
        agent: AnyAgent | None = None,
        episodes: EpisodeLimits | None = None,
        turn_template: str | None = None,
        advantage: AdvantageEstimator | None = None,
        credit: Literal["episode", "turn"] = "episode",
        correction: ImportanceCorrection | None = None,
        token_mask: TopEntropyMask | None = None,
        mask_truncated_completions: bool = False,
        dynamic_sampling: DynamicSampling | None = None,
        teacher: Teacher | None = None,
        distillation: Distillation | None = None,
        prompts_per_rollout: int = 8,
        samples_per_prompt: int = 8,
        minibatches_per_rollout: int = 1,
        epochs_per_rollout: int = 1,
        rollouts_ahead: int = 0,
        **options: Any,
    ) -> None:
        schedule = (prompts_per_rollout, samples_per_prompt, minibatches_per_rollout, epochs_per_rollout, rollouts_ahead)
        rl = RLOptions(
            advantage=advantage or GroupAdvantage(),
            credit=credit,
            correction=correction,
            token_mask=token_mask,
            mask_truncated_completions=mask_truncated_completions,
            dynamic_sampling=dynamic_sampling,
            teacher=teacher,
            distillation=distillation,
        )

        def make_task(parts: TaskParts) -> RLLoop:
            sampler, seed = parts.sampler, parts.seed
            has_turns = environment is not None or agent is not None
            scored_by = EpisodeReturn() if reward is None and has_turns else reward
            playing, needs_number = None if agent is None else as_agent(agent), False
            if playing is not None and scored_by is not None:
                needs_number = any(isinstance(term, EpisodeReturn) for term, _ in as_reward(scored_by).terms())
            how = parts.policy.pretrained, turn_template, credit == "turn", playing, needs_number
            played = Episodes(environment, episodes, *how)
            generation = generation_of(parts.policy, sampler, scored_by, parts.run, seed, played, rollouts_ahead=rollouts_ahead)
            beside = teacher.held_bytes if teacher is not None else lambda passes: 0
            passes = Passes(
                parts.policy, sampler.temperature, parts.max_tokens, entropy_gradient=loss.needs_entropy, beside=beside
            )
            evaluation = Evaluation(generation, parts.eval_samples, seed)
            return RLLoop(loss, RolloutSchedule(*schedule), generation, passes, evaluation, seed, rl)

        super().__init__(make_task, **options)
