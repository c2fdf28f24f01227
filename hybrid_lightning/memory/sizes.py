"""What an optimizer keeps for each number that it trains, found out by letting it train a few.

`ModelSizes`: parameters and bytes of a model's parts, with each of the three methods; counted on the meta device.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from hybrid_lightning.adapters.budgets import Budget, make_plan
from hybrid_lightning.adapters.candidates import find_candidates, linear_shape
from hybrid_lightning.adapters.lora_settings import LoraSettings
from hybrid_lightning.adapters.plan import AdapterPlan
from hybrid_lightning.errors import ConfigError, ModelError
from hybrid_lightning.memory.settings import RunSettings
from hybrid_lightning.policy.optim import OptimizerCallable, make_optimizer
from hybrid_lightning.policy.quantization import NF4, Quantization
from hybrid_lightning.sharding.parameters import decoder_blocks

_SHAPE = (64, 4096)  # bitsandbytes keeps 8 bits for tensors of 4,096 numbers or more


@dataclass(frozen=True)
class OptimizerBytes:
    """Bytes for each trained number."""

    state: float
    step: float  # more while it makes a step on an accelerator, where it updates all tensors together


def optimizer_bytes(optimizer: OptimizerCallable, dtype: torch.dtype = torch.float32) -> OptimizerBytes:
    """Make one step.

    Args:
        optimizer: Called with parameter groups, as by the policy.
        dtype: Of what it trains.

    Raises:
        ConfigError: If it cannot make a step on a CPU.
    """
    parameter = nn.Parameter(torch.zeros(_SHAPE, dtype=dtype))
    try:
        built = make_optimizer(optimizer, [{"params": [parameter], "lr": 0.0, "name": "full"}])
        parameter.grad = torch.ones_like(parameter)
        built.step()
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(f"model.optimizer cannot be planned for: {' '.join(str(error).split())[:300]}") from error
    kept = [
        value for state in built.state.values() for value in state.values() if isinstance(value, Tensor) and value.numel() > 1
    ]
    # torch's own compute all denominators at once, if not told otherwise; of bfloat16 weights only some at a time.
    alone = (
        built.defaults.get("fused") or built.defaults.get("foreach") is False or not type(built).__module__.startswith("torch.")
    )
    return OptimizerBytes(
        state=sum(value.untyped_storage().nbytes() for value in kept) / parameter.numel(), step=0.0 if alone else 4.0
    )


FLOAT32 = 4  # bytes


def meta_model(config: PretrainedConfig, dtype: torch.dtype, layers: int | None = None) -> nn.Module:
    """The model of a config, frozen and without memory.

    Args:
        config: Of a causal language model.
        dtype: Of its weights.
        layers: As if it had so few; None for all.

    Raises:
        ModelError: If transformers knows no such causal language model.
    """
    if layers is not None:
        config = copy.deepcopy(config)
        text: Any = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"cannot make a causal language model of this config: {' '.join(str(error).split())[:300]}") from error
    return model.requires_grad_(False).eval()


def plan_of_budget(candidates: Mapping[str, nn.Module], budget: Budget, lora: LoraSettings) -> AdapterPlan:
    """A plan as a budget would make it if the largest modules had the highest scores: it trains as much as may be."""
    scores = {name: float(module.weight.numel()) for name, module in candidates.items()}  # type: ignore[operator, union-attr]
    return make_plan(model="", model_digest="", candidates=candidates, budget=budget, lora=lora, scores=scores)


@dataclass(frozen=True)
class ModelSizes:
    """What a model with an adapter holds; all in bytes but for the counts."""

    parameters: int  # of the base
    trainable: int  # numbers
    full: int  # of these, in fully trained modules
    trained_width: int  # bytes of a trained number, and of its gradient
    frozen_bytes: int  # base weights that are kept
    block_bytes: int  # the largest decoder block, with its part of the adapter
    block_gradients: int  # of that block
    block_parameters: int  # of that block, trained or not
    outside_bytes: int  # what is in no block: embeddings, output layer
    candidates: int  # numbers in all candidates
    share_full: float  # of the candidates' numbers

    @property
    def trained_bytes(self) -> int:
        """The weights that are trained, which are as many bytes as their gradients."""
        return self.trainable * self.trained_width

    @property
    def weight_bytes(self) -> int:
        """All weights."""
        return self.frozen_bytes + self.trained_bytes


def measure(settings: RunSettings, plan: AdapterPlan) -> ModelSizes:
    """Sizes of the model of these settings when it is adapted as planned.

    Args:
        settings: Of the run.
        plan: Of this model.
    """
    model = meta_model(settings.config, settings.dtype)
    width, trained_width = settings.dtype.itemsize, settings.trained_dtype.itemsize
    blocks = decoder_blocks(model)
    in_block = {id(parameter) for block in blocks for parameter in block.parameters()}
    outside = sum(p.numel() for p in model.parameters() if id(p) not in in_block)
    owner = {id(module): number for number, block in enumerate(blocks) for module in block.modules()}
    base = [sum(p.numel() for p in block.parameters()) for block in blocks]
    frozen = [numbers * width for numbers in base]
    trained = [0] * len(blocks)
    full = 0
    planned = {module.name: module for module in plan.candidates}
    for name, module in find_candidates(model).items():
        number, shape = owner[id(module)], linear_shape(module)
        mode = planned[name].mode if name in planned else "frozen"
        numbers = sum(p.numel() for p in module.parameters())
        if mode == "full":
            trained[number] += numbers
            full += numbers
            if not settings.keep_start_weights:
                frozen[number] -= numbers * width
            continue
        if mode == "lora":
            trained[number] += plan.lora.parameters(shape)
        if settings.quantization is not None and settings.quantization.takes(shape):
            frozen[number] += quantized_bytes(settings.quantization, shape) - shape[0] * shape[1] * width
    sizes = [kept + trained_width * count for kept, count in zip(frozen, trained, strict=True)]
    largest = max(range(len(blocks)), key=sizes.__getitem__)
    candidates = sum(module.parameters for module in plan.candidates)
    return ModelSizes(
        parameters=outside + sum(base),
        trainable=sum(trained),
        full=full,
        trained_width=trained_width,
        frozen_bytes=outside * width + sum(frozen),
        block_bytes=sizes[largest],
        block_gradients=trained_width * trained[largest],
        block_parameters=base[largest] + trained[largest],
        outside_bytes=outside * width,
        candidates=candidates,
        share_full=full / candidates,
    )


def quantized_bytes(quantization: Quantization, shape: tuple[int, int]) -> int:
    """Of a weight of this shape, (outputs, inputs), in the format of the quantization, scales included."""
    outputs, inputs = shape
    count = outputs * inputs
    if isinstance(quantization, NF4):
        # A scale of 8 bits for 64 weights, and one of 32 bits for 256 of those; and two small tables.
        return count // 2 + count // 64 + FLOAT32 * (count // (64 * 256) + 256 + 16)
    return count + 2 * FLOAT32 * outputs
