"""How many bits the frozen base is kept in while it is trained around.

    16-bit base -> scores -> plan -> quantized base + float32 copies of the fully trained modules -> adapter

The base is loaded in 16 (or 32) bits, which scoring needs, and its linear modules are then quantized one at a time, in memory:
so it works for every model that can be loaded, GGUF files included, and the names of what is left alone are exact. Left alone are
the modules that the plan trains fully, and what is outside the decoder blocks (embeddings, output layer).
"""

from abc import ABC, abstractmethod
from collections.abc import Collection
from importlib.util import find_spec
from typing import ClassVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hybrid_lightning.adapters.candidates import find_candidates, linear_shape
from hybrid_lightning.configurable import Configurable
from hybrid_lightning.errors import ConfigError

_BLOCK = 64  # weights with a scale of their own


class Quantization(Configurable, ABC):
    """A format for frozen weights, by bitsandbytes.

    Raises:
        ConfigError: If bitsandbytes is not installed.
    """

    peft_flag: ClassVar[str]  # attribute of a model by which PEFT knows that it has such layers

    def __init__(self) -> None:
        if find_spec("bitsandbytes") is None:
            raise ConfigError(
                f"model.quantization={type(self).__name__} needs the package bitsandbytes, which is not installed; install it "
                "with pip install 'hybrid-lightning[quantization]'"
            )

    def takes(self, shape: tuple[int, int]) -> bool:
        """Whether a weight of this shape, (outputs, inputs), can be quantized; one that cannot stays as it is."""
        return True

    @abstractmethod
    def layer(self, weight: Tensor, bias: nn.Parameter | None, device: torch.device) -> nn.Linear:
        """Quantize a weight [m, n] on a device, as a linear layer without gradient."""


class NF4(Quantization):
    """4 bits a weight (NormalFloat of QLoRA, arXiv 2305.14314) and 0.13 for scales.

    It takes weights whose inputs are a multiple of 64: in others a block of weights with one scale spans two rows, which
    bitsandbytes' kernels for CPUs unpack wrongly (0.50.2).
    """

    peft_flag = "is_loaded_in_4bit"

    def takes(self, shape: tuple[int, int]) -> bool:
        """Whether rows are made of whole blocks."""
        return shape[1] % _BLOCK == 0

    def layer(self, weight: Tensor, bias: nn.Parameter | None, device: torch.device) -> nn.Linear:
        """See `Quantization`."""
        from hybrid_lightning.policy.quantized_linear import NF4Linear

        return NF4Linear(weight, bias, device)


class Int8(Quantization):
    """8 bits a weight, and one scale for each output."""

    peft_flag = "is_loaded_in_8bit"

    def layer(self, weight: Tensor, bias: nn.Parameter | None, device: torch.device) -> nn.Linear:
        """See `Quantization`."""
        from hybrid_lightning.policy.quantized_linear import Int8Linear

        return Int8Linear(weight, bias, device)


def quantize_base(
    model: nn.Module, quantization: Quantization, full_modules: Collection[str], device: torch.device | None = None
) -> None:
    """Quantize the linear modules in the decoder blocks, one at a time; to be called before the adapter is applied.

    Args:
        model: Base model with its weights; changed in place.
        quantization: The format.
        full_modules: Names of the modules that will be trained fully, which stay as they are.
        device: Where to quantize, and where the weights are afterwards; None leaves each where it is.

    Raises:
        ConfigError: If nothing can be quantized.
    """
    plain = {name: module for name, module in find_candidates(model).items() if type(module) in (nn.Linear, Conv1D)}
    frozen = [name for name in plain if name not in full_modules]
    names = [name for name in frozen if quantization.takes(linear_shape(plain[name]))]
    kind = type(quantization).__name__
    if not frozen:
        raise ConfigError(
            f"model.quantization={kind} has nothing to quantize, since the plan trains all {len(plain)} linear modules fully; "
            "lower adapter.budget.share, or set model.quantization=null"
        )
    if not names:
        raise ConfigError(
            f"model.quantization={kind} has nothing to quantize: it takes weights whose inputs are a multiple of {_BLOCK}, and "
            "no linear module has such; use model.quantization=Int8, or null"
        )
    del plain  # so that each weight is freed when it has been quantized
    for name in names:
        module = model.get_submodule(name)
        weight, bias = module.get_parameter("weight").detach(), module.bias
        if isinstance(module, Conv1D):
            weight = weight.T.contiguous()
        assert bias is None or isinstance(bias, nn.Parameter)
        layer = quantization.layer(weight, bias, weight.device if device is None else device)
        model.set_submodule(name, layer.train(module.training))
    setattr(model, quantization.peft_flag, True)


def check_quantization(quantization: Quantization, trainer: Trainer) -> None:
    """Check that the strategy can hold a quantized base.

    Raises:
        ConfigError: If it splits weights over devices.
    """
    strategy = trainer.strategy
    if isinstance(strategy, ParallelStrategy) and not isinstance(strategy, DDPStrategy):
        kind, name = type(quantization).__name__, type(strategy).__name__
        raise ConfigError(
            f"model.quantization={kind} does not work with {name}, which would split packed weights apart from their scales; use "
            "trainer.strategy=ddp, where each device has the whole quantized base, or set model.quantization=null"
        )
