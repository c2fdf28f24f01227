"""Checks of a run's settings: errors for settings that cannot work, warnings if two runs with the same seed may differ.

This package computes the same bits in every run on one machine, however busy the machine is. Two runs can differ if a clock
decides something, or if a library adds up numbers in the order in which its threads finish.
"""

import os
from collections.abc import Iterator, Mapping, Sequence

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import PolicyLoss, SampledReverseKL
from hybrid_lightning.rewards import EpisodeReturn, RewardFunction
from hybrid_lightning.rollout.dynamic_sampling import DynamicSampling
from hybrid_lightning.rollout.loader import RolloutSchedule
from hybrid_lightning.rollout.rollout_engine import WeightedEngine
from hybrid_lightning.shared.configurable import lost_paths
from hybrid_lightning.shared.user_code import in_user_code
from hybrid_lightning.training.generation import Generation
from hybrid_lightning.training.options import RLOptions
from hybrid_lightning.training.run import Run
from hybrid_lightning.training.teachers import SelfTeacher
from hybrid_lightning.types import Rollout, Sequences

_DETERMINISTIC_FLASH = "FLASH_ATTENTION_DETERMINISTIC"


def check_options(options: RLOptions, generation: Generation, loss: PolicyLoss) -> None:
    """Raise ConfigError if environment or loss do not work with these options, whatever the run."""
    if options.credit == "turn" and generation.player.agent is not None:
        raise ConfigError("model.credit=turn needs an environment's rewards of turns, which an agent has not; set credit=episode")
    if options.credit == "turn" and generation.episodes is None:
        raise ConfigError("model.credit=turn needs model.environment, which is not set; set it, or set credit=episode")
    if generation.player.agent is not None and isinstance(options.teacher, SelfTeacher) and options.teacher.template is not None:
        raise ConfigError(
            "model.teacher.context changes the prompts that the teacher sees, but an agent writes what it asks; leave the "
            "context out, or use an environment"
        )
    of_tokens = options.teacher is not None and not (options.distillation or SampledReverseKL()).of_distributions
    if options.credit == "turn" or of_tokens:
        loss.check_token_advantages()


def check_rl(options: RLOptions, schedule: RolloutSchedule, generation: Generation, loss: PolicyLoss) -> None:
    """Raise ConfigError if settings of a reinforcement learning run do not work together, and warn of doubtful ones."""
    run, sampler, advantage, correction = generation.run, generation.sampler, options.advantage, options.correction
    if generation.player.agent is not None:
        generation.player.check_agent(sampler.is_remote)
    if generation.reward is None and run.stage in ("fit", "predict"):  # the other stages measure without one
        raise ConfigError(
            "model.reward is missing; give a reward, such as MathMatch, or an environment or agent that gives rewards"
        )
    if correction is not None and isinstance(sampler, WeightedEngine) and not sampler.keeps_all_tokens:
        raise ConfigError(
            f"model.correction={type(correction).__name__} compares probabilities over all tokens, but {type(sampler).__name__} "
            "with top_p, top_k or min_p reports probabilities over the kept tokens only; set sampler.top_p=1, top_k=0 and "
            "min_p=0, or model.correction=null, or use Sampler"
        )
    advantage.check_samples(schedule.samples_per_prompt)
    for term in generation.reward_terms():
        with in_user_code(term, "check_length"):
            term.check_length(generation.max_completion_tokens)
    if run.stage != "fit":
        return
    schedule.check_split(run.accumulate_grad_batches, run.world_size)
    for reason in _against_ahead(generation, options.dynamic_sampling) if schedule.rollouts_ahead else ():
        raise ConfigError(f"model.rollouts_ahead={schedule.rollouts_ahead}: {reason}")
    if not generation.policy.is_loaded:
        return
    if advantage.divides_by_group_std and not loss.takes_group_std:
        rank_zero_warn(
            f"{type(loss).__name__} is meant for advantages that are not divided by the group's standard deviation, but "
            f"{type(advantage).__name__} divides them; give --model.advantage=GroupMeanAdvantage"
        )
    if isinstance(sampler, WeightedEngine) and correction is None:
        rank_zero_warn(
            "vLLM computes slightly different probabilities than training, and model.correction is not set; check "
            "sampling/logp_difference, and give --model.correction=TokenTruncation, as in configs/rollout/vllm.yaml"
        )


def _against_ahead(generation: Generation, dynamic_sampling: DynamicSampling | None) -> Iterator[str]:
    """Why engine, sampling, environment or Trainer flags do not work with rollouts ahead."""
    run, sampler = generation.run, generation.sampler
    if sampler.shares_device:
        yield (
            f"{type(sampler).__name__} generates on the training device, so rollouts cannot overlap with training; use "
            "VLLMServerSampler, or set rollouts_ahead=0"
        )
    if run.restarts_epochs:
        yield f"{run.restarts_epochs}; leave it out, or set rollouts_ahead=0"
    if sampler.is_remote and dynamic_sampling is not None:
        yield (
            f"with model.dynamic_sampling and {type(sampler).__name__}, the number of prompts in a rollout is known only when it "
            "is complete; set rollouts_ahead=0, or leave dynamic_sampling out"
        )
    played = generation.episodes
    if sampler.is_remote and played is not None and played.environment is not None and not played.limits.workers:
        yield (
            "environments run during training, and may change global state such as random generators; set "
            "model.episodes.workers to 1 or more to run them in their own processes"
        )


def warn_if_all_are_cut(trained: Sequences, rollout: Rollout, generation: Generation) -> None:
    """Warn if a rollout has counted completions, but no token that the loss can learn from."""
    count = len(rollout.scored.of_counted().total)
    if count and not trained.sampled_mask.any():
        rank_zero_warn(all_are_cut(count, "a rollout", generation))


def all_are_cut(count: int, of: str, generation: Generation) -> str:
    """Cause and remedy if all completions were cut and are masked; `of` names the rollout that they belong to."""
    what, options = "completions", "model.sampler.max_new_tokens"
    limits = f"at max_new_tokens={generation.sampler.max_new_tokens}"
    if generation.episodes is not None:
        what, options = "episodes", f"{options} and model.episodes.max_tokens"
        limits += f" of a message or episodes.max_tokens={generation.max_completion_tokens} of an episode"
    return (
        f"all {count} {what} of {of} were cut {limits}, and model.mask_truncated_completions leaves these out of the loss, so "
        f"nothing is learned from them; raise {options}, or set model.mask_truncated_completions=false"
    )


def unread_rewards(generation: Generation, metrics: Mapping[str, float]) -> str:
    """Message about environment rewards that `model.reward` ignores, from a rollout's metrics; "" if there are none."""
    if not metrics.get("episodes/return") or any(isinstance(term, EpisodeReturn) for term in generation.reward_terms()):
        return ""
    assert generation.episodes is not None, "which have a return"
    return (
        f"{generation.episodes.player} gives rewards, but model.reward ignores them; add EpisodeReturn to "
        "it, or leave model.reward out to train only on them"
    )


def warn_if_lost(reward: RewardFunction) -> None:
    """Warn of a reward that cannot be rebuilt from a checkpoint, which holds the paths of functions and classes."""
    lost = lost_paths(reward.to_config())
    if lost:
        rank_zero_warn(
            f"checkpoints store {', '.join(lost)} of model.reward only by name, and other programs cannot find it; put it into "
            "its own file, as in FunctionReward('my_reward.py:function'), or load checkpoints with load_from_checkpoint(path, "
            "reward=...); generate and export need no reward"
        )


def warn_of_differences(run: Run, attention: str | None, rewards: Sequence[RewardFunction]) -> None:
    """Warn in one line of every reason why two runs with the same seed may differ, each with its remedy.

    `attention` has its name in transformers; None if it is unknown.

    Raises:
        ConfigError: If `trainer.deterministic=true` is set but the attention is not deterministic, which torch cannot detect.
    """
    causes = list(_causes(run, attention, rewards))
    if causes:
        rank_zero_warn(f"two runs with the same seed may differ: {'; '.join(causes)}")


def _causes(run: Run, attention: str | None, rewards: Sequence[RewardFunction]) -> Iterator[str]:
    if run.device is not None and run.device.type == "cuda":
        deterministic = torch.are_deterministic_algorithms_enabled()
        if attention is not None and "flash_attention" in attention and os.environ.get(_DETERMINISTIC_FLASH) != "1":
            cause = (
                "the backward pass of model.attn_implementation=flash_attention_2 adds numbers in no fixed order; set "
                f"{_DETERMINISTIC_FLASH}=1 in the environment, or use sdpa"
            )
            if deterministic and not torch.is_deterministic_algorithms_warn_only_enabled():
                raise ConfigError(f"trainer.deterministic=true is not possible: {cause}")
            yield cause
        if not deterministic:
            yield "some GPU operations add numbers in no fixed order; set trainer.deterministic=true"
        if torch.backends.cudnn.benchmark:
            yield "trainer.benchmark=true chooses kernels by a clock; set it to false"
    if os.environ.get("OMP_DYNAMIC", "").strip().lower() == "true":
        yield "OMP_DYNAMIC=true lets the number of threads depend on the machine's load; unset it"
    if run.stage == "fit" and run.ends_by_clock:
        yield "trainer.max_time ends training by a clock; set only trainer.max_steps"
    for reward in rewards:
        with in_user_code(reward, "decided_by_time"):
            decided = reward.decided_by_time()
        if decided is not None:
            yield f"reward {reward.name}: {decided}"
