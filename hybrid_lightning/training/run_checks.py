"""Settings of a run: those that cannot work are refused, and those with which two runs with one seed may differ are named.

This package computes the same bits in every run on one machine, however busy it is. Two runs can differ where a clock decides
something, or where a library adds up numbers in whatever order its threads finish.
"""

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from hybrid_lightning.engine import base_model
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.model.precision import check_precision, use_bfloat16_precision
from hybrid_lightning.model.quantization import check_quantization
from hybrid_lightning.process import prepare_gpu
from hybrid_lightning.rewards import RewardFunction
from hybrid_lightning.sharding.checks import check_strategy
from hybrid_lightning.user_code import in_user_code

if TYPE_CHECKING:
    from hybrid_lightning.training.language import LanguageModule
    from hybrid_lightning.training.module import PolicyModule

_DETERMINISTIC_FLASH = "FLASH_ATTENTION_DETERMINISTIC"


def check_run(policy: "LanguageModule") -> None:
    """Refuse settings of a policy's run that cannot work, and warn of doubtful ones once the weights are loaded."""
    trainer, strategy, dtype = policy.trainer, policy.trainer.strategy, policy.pretrained.dtype
    if strategy.root_device.type == "cuda":
        prepare_gpu(own_allocator=policy.sampler.shares_device)
    check_strategy(trainer, policy.optimization.optimizer, dtype)
    if policy.quantization is not None:
        check_quantization(policy.quantization, trainer)
    check_precision(str(trainer.precision), dtype, policy.optimization.optimizer)
    use_bfloat16_precision(strategy)
    policy.generation.check()
    if policy.plan is not None:
        policy.check_start_weights(policy.keep_start_weights)
    if policy.is_loaded:  # else the attention is not known
        attention = getattr(base_model(policy.model).config, "_attn_implementation", None)
        warn_of_differences(trainer, attention, policy.reward_terms())


def check_ahead(policy: "PolicyModule") -> None:
    """Raise ConfigError if engine, sampling, environment or flags of the Trainer do not go with rollouts ahead."""
    ahead = policy.rollout_schedule.rollouts_ahead
    for reason in _against_ahead(policy) if ahead else ():
        raise ConfigError(f"model.rollouts_ahead={ahead}: {reason}")


def _against_ahead(policy: "PolicyModule") -> Iterator[str]:
    sampler, trainer = policy.sampler, policy.trainer
    if sampler.shares_device:
        yield (
            f"{type(sampler).__name__} generates on the device that trains, so that nothing would be done meanwhile; take "
            "VLLMServerSampler, or rollouts_ahead=0"
        )
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        yield "trainer.overfit_batches begins each epoch anew; set rollouts_ahead=0"
    if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        yield (
            "trainer.reload_dataloaders_every_n_epochs would drop the rollouts that were begun; leave it out, or set "
            "rollouts_ahead=0"
        )
    if sampler.is_remote and policy.dynamic_sampling is not None:
        yield (
            f"with model.dynamic_sampling and {type(sampler).__name__} how many prompts a rollout takes would be known only when "
            "it is made; set rollouts_ahead=0, or leave dynamic_sampling out"
        )
    if sampler.is_remote and policy.episodes is not None and not policy.episodes.limits.workers:
        yield (
            "environments run while the policy is trained, and may change what the process has once, such as random generators; "
            "give them processes of their own, by model.episodes.workers=1 or more"
        )


def warn_of_differences(trainer: Trainer, attention: str | None, rewards: Sequence[RewardFunction]) -> None:
    """Warn in one line of every cause for which two runs with one seed may differ, each with its remedy.

    The attention is named as in transformers, None if it is not known.

    Raises:
        ConfigError: If `trainer.deterministic=true` is set but the attention is not deterministic, which torch cannot tell.
    """
    causes = list(_causes(trainer, attention, rewards))
    if causes:
        rank_zero_warn(f"two runs with one seed may differ: {'; '.join(causes)}")


def _causes(trainer: Trainer, attention: str | None, rewards: Sequence[RewardFunction]) -> Iterator[str]:
    if trainer.strategy.root_device.type == "cuda":
        deterministic = torch.are_deterministic_algorithms_enabled()
        if attention is not None and "flash_attention" in attention and os.environ.get(_DETERMINISTIC_FLASH) != "1":
            cause = (
                "the backward pass of model.attn_implementation=flash_attention_2 adds in no fixed order; set "
                f"{_DETERMINISTIC_FLASH}=1 in the environment, or take sdpa"
            )
            if deterministic and not torch.is_deterministic_algorithms_warn_only_enabled():
                raise ConfigError(f"trainer.deterministic=true cannot be had: {cause}")
            yield cause
        if not deterministic:
            yield "some operations of a GPU add in no fixed order; set trainer.deterministic=true"
        if torch.backends.cudnn.benchmark:
            yield "trainer.benchmark=true chooses kernels by a clock; set it to false"
    if os.environ.get("OMP_DYNAMIC", "").strip().lower() == "true":
        yield "OMP_DYNAMIC=true lets the number of threads depend on the machine's load; unset it"
    if trainer.state.fn == "fit" and any(isinstance(callback, Timer) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        yield "trainer.max_time ends training by a clock; give trainer.max_steps alone"
    for reward in rewards:
        with in_user_code(reward, "decided_by_time"):
            decided = reward.decided_by_time()
        if decided is not None:
            yield f"reward {reward.name}: {decided}"
