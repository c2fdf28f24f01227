"""`RunSettings`: the settings that decide a run's memory, read from the run's objects without loading weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry
from transformers import PretrainedConfig

from hybrid_lightning.adapters.budgets import Planning
from hybrid_lightning.adapters.plan import AdapterPlan
from hybrid_lightning.data import PromptDataModule
from hybrid_lightning.errors import ConfigError, DataError, ModelError, one_line
from hybrid_lightning.losses import Divergence
from hybrid_lightning.memory.strategies import DDP, FSDP2, Sharding, SingleDevice
from hybrid_lightning.model.loading import DTYPES
from hybrid_lightning.model.precision import check_precision, memory_of
from hybrid_lightning.model.quantization import Quantization
from hybrid_lightning.rollout.loader import RolloutSchedule
from hybrid_lightning.rollout.rollout_engine import RolloutEngine
from hybrid_lightning.rollout.sampler import Sampler
from hybrid_lightning.rollout.vllm.in_process import VLLMSampler
from hybrid_lightning.runner import activation_bytes, tokens_of_pass, why_no_halves
from hybrid_lightning.sharding.checks import check_optimizer
from hybrid_lightning.sharding.fsdp2 import FSDP2Strategy
from hybrid_lightning.training.optim import Optimization
from hybrid_lightning.training.policy_module import PolicyModule
from hybrid_lightning.training.teachers import ModelTeacher

_MAX_PROMPTS = 500  # most prompts to encode when looking for the longest


@dataclass(frozen=True)
class TrainerFlags:
    """Flags of a Trainer. No Trainer is built: its devices may not be on this machine."""

    sharding: Sharding = field(default_factory=SingleDevice)
    on_cpu: bool = True
    precision: str = "32-true"
    accumulate_grad_batches: int = 1
    validates: bool = True
    device_bytes: int | None = None  # memory of each accelerator, or of the machine; None: unknown

    @classmethod
    def of(cls, flags: Mapping[str, Any], device_gib: float | None = None) -> "TrainerFlags":
        """Read the Trainer's part of a config.

        `device_gib` is the memory of each device in GiB, and makes the devices GPUs unless the accelerator is "cpu"; None takes
        the devices of this machine.

        Raises:
            ConfigError: If memory cannot be planned for the strategy, or a device has no memory.
        """
        if device_gib is not None and not device_gib > 0:
            raise ConfigError(f"device_gib must be a positive number, got {device_gib}")
        kind = flags.get("accelerator") or "auto"
        on_cpu = kind == "cpu" or (kind == "auto" and device_gib is None and not torch.accelerator.is_available())
        devices = _device_count(flags.get("devices", "auto"), on_cpu) * int(flags.get("num_nodes") or 1)
        device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator() or torch.device("cuda")
        return cls(
            sharding=_sharding(flags.get("strategy") or "auto", devices, on_cpu),
            on_cpu=on_cpu,
            precision=str(flags.get("precision") or "32-true"),
            accumulate_grad_batches=int(flags.get("accumulate_grad_batches") or 1),
            validates=flags.get("limit_val_batches") != 0,
            device_bytes=memory_of(device) if device_gib is None else int(device_gib * 2**30),
        )

    @classmethod
    def of_trainer(cls, trainer: Trainer) -> "TrainerFlags":
        """The flags of an existing Trainer."""
        device = trainer.strategy.root_device
        return cls(
            _sharding(trainer.strategy, trainer.world_size, device.type == "cpu"),
            device.type == "cpu",
            str(trainer.precision),
            trainer.accumulate_grad_batches,
            validates=trainer.limit_val_batches != 0,
            device_bytes=memory_of(device),
        )

    @property
    def avoids_halves(self) -> bool:
        """Whether 16-bit products are computed in float32, with float32 weights (see `Policy.precision`)."""
        return self.on_cpu and self.precision.endswith("mixed") and bool(why_no_halves())


class Adapting(Protocol):
    """What memory depends on of the callback `HybridAdapterSetup`."""

    planning: Planning
    given_plan: AdapterPlan | None
    keep_start_weights: bool


@dataclass(frozen=True)
class RunSettings:
    """A run, and the lengths of its sequences."""

    config: PretrainedConfig  # of the model
    prompt_tokens: int  # length of each prompt
    completion_tokens: int  # length of every completion, or of an episode after its prompt
    schedule: RolloutSchedule
    planning: Planning  # budget, LoRA, candidates, and how they are scored
    flags: TrainerFlags = field(default_factory=TrainerFlags)
    sampler: RolloutEngine = field(default_factory=Sampler)
    optimization: Optimization = field(default_factory=Optimization)
    dtype: torch.dtype = torch.float32  # of the frozen weights; trained weights are float32
    quantization: Quantization | None = None  # of the frozen weights
    attention: str | None = None  # requested implementation
    gradient_checkpointing: bool = False
    max_tokens_per_micro_batch: int | None = None
    entropy_gradient: bool = False  # whether the loss has an entropy bonus
    eval_prompts: int = 0  # prompts that a device validates together; 0: no validation
    eval_samples: int = 8
    plan: AdapterPlan | None = None  # plan of the run, if it exists already
    keep_start_weights: bool = True
    teacher: ModelTeacher | None = None  # a second model from which the policy learns
    compared: int = 0  # blocks of logits that a divergence from a teacher holds

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1:
            raise ConfigError(f"prompt_tokens must be at least 1, got {self.prompt_tokens}")

    @classmethod
    def of(
        cls,
        policy: PolicyModule,
        adapter: Adapting,
        data: LightningDataModule | None,
        flags: TrainerFlags,
        prompt_tokens: int | None = None,
    ) -> "RunSettings":
        """Read the settings of a policy, of the callback `HybridAdapterSetup`, and of the data. No weights are loaded.

        Prompts have `prompt_tokens`; None takes `data.max_prompt_tokens`, or else the longest training prompt.

        Raises:
            ConfigError: If a value is impossible, or the length of the prompts or the memory of a device cannot be determined.
            ModelError: If the model's config cannot be read.
        """
        pretrained, task = policy.policy.pretrained, policy.task
        teaching, sampler = task.teaching, task.generation.sampler
        check_precision(flags.precision, pretrained.dtype, policy.optimization.optimizer)
        if flags.sharding.splits:
            check_optimizer(policy.optimization.optimizer, flags.sharding.name)
        if isinstance(sampler, VLLMSampler) and not flags.on_cpu and flags.device_bytes is None:
            raise ConfigError(
                f"sampler.gpu_memory_utilization={sampler.gpu_memory_utilization} is a share of a GPU's memory, and there is no "
                "GPU here; give --device_gib, the memory of a GPU in GiB"
            )
        return cls(
            pretrained.config,
            _prompt_tokens(policy, data) if prompt_tokens is None else prompt_tokens,
            task.generation.max_completion_tokens,
            task.schedule,
            adapter.planning,
            flags,
            sampler,
            policy.optimization,
            dtype=torch.float32 if flags.avoids_halves else DTYPES[pretrained.dtype],
            quantization=policy.policy.quantization,
            attention=pretrained.attn_implementation,
            gradient_checkpointing=policy.policy.gradient_checkpointing,
            max_tokens_per_micro_batch=task.passes.max_tokens,
            entropy_gradient=task.loss.needs_entropy,
            eval_prompts=_eval_prompts(data) if flags.validates else 0,
            eval_samples=task.evaluation.samples,
            plan=adapter.given_plan,
            keep_start_weights=adapter.keep_start_weights,
            teacher=teaching.teacher if isinstance(teaching.teacher, ModelTeacher) else None,
            compared=teaching.distillation.held_blocks if isinstance(teaching.distillation, Divergence) else 0,
        )

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype of products under the run's precision."""
        return torch.bfloat16 if self.flags.precision.endswith("mixed") and not self.flags.avoids_halves else self.dtype

    def tokens_of_pass(self, weights: float = 0.0, trained: float = 0.0) -> int:
        """Tokens that a pass may take on a device with this many bytes of weights and number of trained weights."""
        if self.max_tokens_per_micro_batch:
            return self.max_tokens_per_micro_batch
        on_cpu, memory = self.flags.on_cpu, self.flags.device_bytes
        rest = None if on_cpu or memory is None else activation_bytes(memory, weights, trained)
        return tokens_of_pass(self.config, self.gradient_checkpointing, on_cpu, rest)


def _prompt_tokens(policy: PolicyModule, data: LightningDataModule | None) -> int:
    if isinstance(data, PromptDataModule) and data.max_prompt_tokens is not None:
        return data.max_prompt_tokens
    try:
        prompts = data.train_prompts  # type: ignore[union-attr]  # a user's data module may have them, too
        return max(len(policy.encode(prompt)) for prompt in prompts[:_MAX_PROMPTS])
    except (AttributeError, ValueError, OSError, DataError, ModelError, ConfigError) as error:
        raise ConfigError(f"the length of the prompts cannot be determined ({one_line(error)}); give --prompt_tokens") from error


def _eval_prompts(data: LightningDataModule | None) -> int:
    if not isinstance(data, PromptDataModule):
        return 0
    return min(data.eval_batch_size, data.limits["validation"] or data.eval_batch_size)


def _device_count(devices: Any, on_cpu: bool) -> int:
    """Number of devices that `trainer.devices` requests."""
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part.strip()])
    if isinstance(devices, (list, tuple)):
        return len(devices)
    if str(devices) in ("auto", "-1", "None"):
        return 1 if on_cpu else max(1, torch.accelerator.device_count())
    return int(devices)


def _sharding(strategy: Any, devices: int, on_cpu: bool) -> Sharding:
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    if isinstance(strategy, FSDP2Strategy) or name == "fsdp":
        return FSDP2(devices, cpu_offload=getattr(strategy, "cpu_offload", False) and not on_cpu)
    if isinstance(strategy, DDPStrategy) or (name.startswith("ddp") and name in StrategyRegistry.available_strategies()):
        return DDP(devices)
    if isinstance(strategy, SingleDeviceStrategy) or name == "auto":
        return SingleDevice() if devices == 1 else DDP(devices)  # Lightning's choice
    raise ConfigError(f"cannot plan memory for trainer.strategy={name}; use auto, ddp, or --config configs/strategy/fsdp.yaml")
