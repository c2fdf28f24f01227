"""Read `RunSettings` and `Sharding` from a run's config.

The small objects of the config, such as the sampler, are built, but for `plan` neither the policy nor the Trainer.
"""

import inspect
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry

from hybrid_lightning.adapters.gradients import ExactGradients
from hybrid_lightning.environments import EpisodeLimits
from hybrid_lightning.errors import ConfigError, DataError, ModelError, one_line
from hybrid_lightning.memory.settings import RunSettings
from hybrid_lightning.memory.strategies import DDP, FSDP2, Sharding, SingleDevice
from hybrid_lightning.model.loading import DTYPES, load_tokenizer, read_config, resolve_model
from hybrid_lightning.model.precision import check_precision
from hybrid_lightning.model.prompts import PromptEncoder
from hybrid_lightning.rollout.sampler import Sampler
from hybrid_lightning.rollout.vllm.in_process import VLLMSampler
from hybrid_lightning.sharding.checks import check_optimizer
from hybrid_lightning.sharding.fsdp2 import FSDP2Strategy
from hybrid_lightning.training.policy_module import PolicyModule

_MAX_PROMPTS = 500  # at most so many are encoded to find the longest


@dataclass(frozen=True)
class TrainerFlags:
    """Flags of a Trainer that is not built, since its devices may not be on this machine."""

    sharding: Sharding
    on_cpu: bool
    precision: str
    accumulate_grad_batches: int
    validates: bool  # whether the run validates
    device_bytes: int | None = None  # memory of each accelerator, or of the machine; None: unknown

    @classmethod
    def of(cls, flags: Mapping[str, Any], device_gib: float | None = None) -> "TrainerFlags":
        """Read the Trainer's part of a config.

        `device_gib` is the memory of each device in GiB, which is then a GPU unless the accelerator is "cpu"; None for what is
        here.

        Raises:
            ConfigError: If memory cannot be planned for the strategy, there is no device, or it has no memory.
        """
        if device_gib is not None and not device_gib > 0:
            raise ConfigError(f"device_gib must be a positive number, got {device_gib}")
        kind = flags.get("accelerator") or "auto"
        on_cpu = kind == "cpu" or (kind == "auto" and device_gib is None and not torch.accelerator.is_available())
        devices = _device_count(flags.get("devices", "auto"), on_cpu) * _at_least_one("num_nodes", flags.get("num_nodes", 1))
        of_apple = kind == "mps" or torch.backends.mps.is_available()
        device = torch.device("cpu") if on_cpu else torch.device("mps" if of_apple else "cuda", 0)
        return cls(
            sharding=_sharding(flags.get("strategy") or "auto", devices, on_cpu),
            on_cpu=on_cpu,
            precision=str(flags.get("precision") or "32-true"),
            accumulate_grad_batches=int(flags.get("accumulate_grad_batches") or 1),
            validates=flags.get("limit_val_batches") != 0,
            device_bytes=_memory_of(device) if device_gib is None else int(device_gib * 2**30),
        )

    @classmethod
    def of_trainer(cls, trainer: Trainer) -> "TrainerFlags":
        """The same of a Trainer that is built."""
        device = trainer.strategy.root_device
        on_cpu = device.type == "cpu"
        return cls(
            _sharding(trainer.strategy, trainer.world_size, on_cpu),
            on_cpu,
            str(trainer.precision),
            trainer.accumulate_grad_batches,
            validates=trainer.limit_val_batches != 0,
            device_bytes=_memory_of(device),
        )


def policy_arguments(policy: type, *given: Any, **named: Any) -> SimpleNamespace:
    """Constructor arguments of a policy as attributes, including defaults, without building the policy."""
    bound = inspect.signature(policy).bind(*given, **named)
    bound.apply_defaults()
    return SimpleNamespace(**{**bound.arguments.pop("kwargs", {}), **bound.arguments})  # of a class of the user's own


def arguments_of(policy: PolicyModule) -> SimpleNamespace:
    """The same of a policy that is built, be its model loaded or not."""
    return policy_arguments(type(policy), **policy._init_args)


def run_settings(policy: Any, adapter: Any, data: Any, flags: TrainerFlags, prompt_tokens: int | None = None) -> RunSettings:
    """Collect the settings of a run that decide its memory.

    `policy` has its arguments as attributes (see `policy_arguments` and `arguments_of`), `adapter` is the callback. Prompts have
    so many tokens; None takes `data.max_prompt_tokens`, or else the longest of the training prompts.

    Raises:
        ConfigError: If a value is impossible, or the length of the prompts or the memory of a device cannot be determined.
        ModelError: If there is no such model.
    """
    if policy.dtype not in DTYPES:
        raise ConfigError(f"model.dtype must be one of {', '.join(DTYPES)}, got {policy.dtype!r}")
    check_precision(flags.precision, policy.dtype, policy.optimizer)
    if isinstance(flags.sharding, FSDP2):
        check_optimizer(policy.optimizer, flags.sharding.name)
    sampler = policy.sampler or Sampler()
    if isinstance(sampler, VLLMSampler) and not flags.on_cpu and flags.device_bytes is None:
        raise ConfigError(
            "there is no GPU here; give --device_gib, the memory of a GPU in GiB, of which sampler.gpu_memory_utilization="
            f"{sampler.gpu_memory_utilization} is a share"
        )
    planning, episodes = adapter.planning, policy.episodes or EpisodeLimits()
    return RunSettings(
        config=read_config(resolve_model(policy.model, policy.revision)),
        prompt_tokens=_prompt_tokens(policy, data) if prompt_tokens is None else prompt_tokens,
        completion_tokens=sampler.max_new_tokens if policy.environment is None else episodes.max_tokens,
        prompts_per_rollout=policy.prompts_per_rollout,
        samples_per_prompt=policy.samples_per_prompt,
        micro_batches=policy.minibatches_per_rollout * flags.accumulate_grad_batches,
        accumulate_grad_batches=flags.accumulate_grad_batches,
        eval_prompts=_eval_prompts(data) if flags.validates else 0,
        eval_samples=policy.eval_samples,
        calibration_prompts=planning.calibration_prompts,
        dtype=DTYPES[policy.dtype],
        mixed_precision=flags.precision.endswith("mixed"),
        on_cpu=flags.on_cpu,
        max_tokens_per_micro_batch=policy.max_tokens_per_micro_batch,
        gradient_checkpointing=policy.gradient_checkpointing,
        quantization=policy.quantization,
        optimizer=policy.optimizer,
        budget=planning.budget,
        lora=planning.lora,
        rank_pattern=planning.rank_pattern,
        target_modules=planning.target_modules,
        keep_start_weights=adapter.keep_start_weights,
        entropy_gradient=policy.loss.needs_entropy,
        plan=adapter.given_plan,
        scoring_copies=int(planning.scorer.needs_gradient and isinstance(planning.gradients, ExactGradients)),
        sampler=sampler,
        device_bytes=flags.device_bytes,
    )


def _prompt_tokens(policy: Any, data: Any) -> int:
    limit = getattr(data, "max_prompt_tokens", None)
    if limit is not None:
        return int(limit)
    try:
        prompts = data.train_prompts[:_MAX_PROMPTS]
        tokenizer = load_tokenizer(resolve_model(policy.model, policy.revision))
        encoder = PromptEncoder(tokenizer, policy.chat_template, policy.chat_template_kwargs)
        return max(len(encoder.encode(prompt)) for prompt in prompts)
    except (AttributeError, ValueError, OSError, DataError, ModelError, ConfigError) as error:
        raise ConfigError(f"the length of the prompts cannot be found out ({one_line(error)}); give --prompt_tokens") from error


def _eval_prompts(data: Any) -> int:
    batch = getattr(data, "eval_batch_size", None)
    limit = getattr(data, "_limits", {}).get("validation")
    return 0 if batch is None else min(batch, limit or batch)


def _memory_of(device: torch.device) -> int | None:
    """Bytes of the memory of a GPU, or of this machine; None where that is not known."""
    if device.type == "cpu":
        with suppress(AttributeError, ValueError, OSError):  # not on Windows
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "mps" and torch.backends.mps.is_available():
        return torch.mps.recommended_max_memory()
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def _device_count(devices: Any, on_cpu: bool) -> int:
    """Number of devices that `trainer.devices` asks for."""
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part.strip()])
    if isinstance(devices, (list, tuple)):
        return len(devices)
    if str(devices) in ("auto", "-1", "None"):
        return 1 if on_cpu else max(1, torch.accelerator.device_count())
    return _at_least_one("devices", devices)


def _at_least_one(name: str, value: Any) -> int:
    count = 1 if value is None else int(value)
    if count < 1:
        raise ConfigError(f"trainer.{name}={value} leaves no device; give at least 1")
    return count


def _sharding(strategy: Any, devices: int, on_cpu: bool) -> Sharding:
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    if isinstance(strategy, FSDP2Strategy):
        return FSDP2(devices, strategy.cpu_offload and not on_cpu)
    if isinstance(strategy, DDPStrategy) or (name.startswith("ddp") and name in StrategyRegistry.available_strategies()):
        return DDP(devices)
    if isinstance(strategy, SingleDeviceStrategy) or name == "auto":
        return SingleDevice() if devices == 1 else DDP(devices)  # Lightning's choice
    raise ConfigError(f"trainer.strategy={name} cannot be planned for; take auto, ddp or fsdp")
