"""`RunSettings`: the settings of a run that decide how much memory it takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import AdamW
from transformers import PretrainedConfig

from hybrid_lightning.adapters.budgets import Budget, ModuleBudget
from hybrid_lightning.adapters.lora_settings import LoraSettings
from hybrid_lightning.adapters.plan import AdapterPlan
from hybrid_lightning.engine import activation_bytes, tokens_of_pass
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.model.quantization import Quantization
from hybrid_lightning.rollout.rollout_engine import RolloutEngine
from hybrid_lightning.rollout.sampler import Sampler
from hybrid_lightning.training.optim import OptimizerCallable


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run, named as in the policy, the adapter callback and the data module."""

    config: PretrainedConfig  # of the model
    prompt_tokens: int  # length of each prompt
    completion_tokens: int  # `sampler.max_new_tokens`, which is taken as the length of every completion
    prompts_per_rollout: int = 8  # over all devices
    samples_per_prompt: int = 8
    micro_batches: int = 1  # that a rollout is split into: minibatches_per_rollout x accumulate_grad_batches
    accumulate_grad_batches: int = 1
    eval_prompts: int = 0  # prompts that a device validates together; 0: no validation
    eval_samples: int = 8
    calibration_prompts: int | None = None  # None: as many as in a rollout
    dtype: torch.dtype = torch.float32  # of the frozen weights
    trained_dtype: torch.dtype = torch.float32  # of the trained weights
    mixed_precision: bool = False  # matrix products in bfloat16, by autocast
    on_cpu: bool = True
    max_tokens_per_micro_batch: int | None = None
    gradient_checkpointing: bool = False
    optimizer: OptimizerCallable = AdamW
    budget: Budget = field(default_factory=ModuleBudget)
    lora: LoraSettings = field(default_factory=LoraSettings)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    target_modules: Sequence[str] | None = None
    keep_start_weights: bool = True
    entropy_gradient: bool = False  # whether the loss has an entropy bonus
    plan: AdapterPlan | None = None  # plan of the run, where there is one already
    quantization: Quantization | None = None  # of the frozen base model
    scoring_copies: int = 1  # float32 copies of all candidates that scoring keeps in the memory of the host
    sampler: RolloutEngine = field(default_factory=Sampler)
    device_bytes: int | None = None  # memory of each accelerator, or of the machine with CPUs; None: unknown

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "completion_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def layers(self) -> int:
        """Number of decoder layers of the model."""
        return int(self.text_config.num_hidden_layers)

    @property
    def text_config(self) -> Any:
        """Config of the language model, which for multimodal models is a part of `config`."""
        return self.config.get_text_config()

    @property
    def scored_prompts(self) -> int:
        """Prompts that are completed in order to score the modules."""
        return self.calibration_prompts or self.prompts_per_rollout

    @property
    def largest_rank(self) -> int:
        """The largest rank that LoRA has in any module, or could have by the pattern."""
        if self.plan is not None:
            return max(self.plan.ranks, default=self.lora.rank)
        return max([self.lora.rank, *self.rank_pattern.values()])

    def tokens_of_pass(self, weights: float = 0.0, trained: float = 0.0) -> int:
        """Tokens that a pass may take on a device with so many bytes of weights, of which so many weights are trained."""
        if self.max_tokens_per_micro_batch:
            return self.max_tokens_per_micro_batch
        known = self.device_bytes is not None and not self.on_cpu
        rest = activation_bytes(self.device_bytes or 0, weights, trained) if known else None
        return tokens_of_pass(self.text_config, self.gradient_checkpointing, self.on_cpu, rest)
