"""Checks of a run's settings: refuses those that cannot work, and warns of those with which two runs with one seed may differ.

This package computes the same bits in every run on one machine, however busy it is. Two runs can differ where a clock decides
something, or where a library adds up numbers in whatever order its threads finish.
"""

import os
from collections.abc import Iterator, Sequence

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.metrics import check_set_name
from hybrid_lightning.policy.optim import OptimizerCallable
from hybrid_lightning.policy.precision import check_precision, use_bfloat16_precision
from hybrid_lightning.policy.quantization import Quantization, check_quantization
from hybrid_lightning.rewards import RewardFunction
from hybrid_lightning.sharding.checks import check_strategy
from hybrid_lightning.types import Prompt

_DETERMINISTIC_FLASH = "FLASH_ATTENTION_DETERMINISTIC"


def check_run(trainer: Trainer, optimizer: OptimizerCallable, dtype: str, quantization: Quantization | None) -> None:
    """Raise ConfigError if strategy, precision, dtype, optimizer and quantization do not work together.

    Args:
        trainer: Has strategy and precision; the strategy gets our plugin for `bf16-true`.
        optimizer: Makes the optimizer of the parameter groups that it is called with.
        dtype: Name of the model's dtype.
        quantization: Of the frozen base; None for none.
    """
    check_strategy(trainer, optimizer, dtype)
    if quantization is not None:
        check_quantization(quantization, trainer)
    check_precision(str(trainer.precision), dtype, optimizer)
    use_bfloat16_precision(trainer.strategy)


def check_prompts(prompts: Sequence[Prompt], rewards: Sequence[RewardFunction]) -> None:
    """Make sure that completions of prompts can be scored and reported on.

    Raises:
        ConfigError: If the name of a set cannot be part of a metric's name.
        RewardError: If a reward cannot score completions of a prompt; a reward may raise other errors as well.
    """
    for name in {prompt.set_name for prompt in prompts}:
        check_set_name(name)
    for reward in rewards:
        for prompt in prompts:
            reward.check_prompt(prompt)


def warn_of_differences(trainer: Trainer, attention: str | None, rewards: Sequence[RewardFunction]) -> None:
    """Warn in one line of every cause for which two runs with one seed may differ, each with its remedy.

    Args:
        trainer: Has the device and the flags of the run.
        attention: Implementation of the model's attention, as transformers names it; None if it is not known.
        rewards: Terms of the reward.

    Raises:
        ConfigError: If `trainer.deterministic=true` is set but the attention is not deterministic, which torch cannot tell.
    """
    causes = [*_causes_in_attention(trainer, attention), *_causes_in_devices(trainer), *_causes_in_clocks(trainer, rewards)]
    if causes:
        rank_zero_warn(f"two runs with one seed may differ: {'; '.join(causes)}")


def _on_cuda(trainer: Trainer) -> bool:
    return trainer.strategy.root_device.type == "cuda"


def _causes_in_attention(trainer: Trainer, attention: str | None) -> Iterator[str]:
    if attention is None or "flash_attention" not in attention or not _on_cuda(trainer):
        return
    if os.environ.get(_DETERMINISTIC_FLASH) == "1":
        return
    cause = (
        "the backward pass of model.attn_implementation=flash_attention_2 adds in no fixed order; set "
        f"{_DETERMINISTIC_FLASH}=1 in the environment, or take sdpa"
    )
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        raise ConfigError(f"trainer.deterministic=true cannot be had: {cause}")
    yield cause


def _causes_in_devices(trainer: Trainer) -> Iterator[str]:
    if _on_cuda(trainer) and not torch.are_deterministic_algorithms_enabled():
        yield "some operations of a GPU add in no fixed order; set trainer.deterministic=true"
    if _on_cuda(trainer) and torch.backends.cudnn.benchmark:
        yield "trainer.benchmark=true chooses kernels by a clock; set it to false"
    if os.environ.get("OMP_DYNAMIC", "").strip().lower() == "true":
        yield "OMP_DYNAMIC=true lets the number of threads depend on the machine's load; unset it"


def _causes_in_clocks(trainer: Trainer, rewards: Sequence[RewardFunction]) -> Iterator[str]:
    if trainer.state.fn == "fit" and any(isinstance(callback, Timer) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        yield "trainer.max_time ends training by a clock; give trainer.max_steps alone"
    for reward in rewards:
        if (decided := reward.decided_by_time()) is not None:
            yield f"reward {reward.name}: {decided}"
