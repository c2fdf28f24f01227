"""Quantization of the frozen base to 4 bits, after its modules have been scored.

    16-bit base -> scores -> plan -> quantized base + float32 copies of the fully trained modules -> adapter

The base is loaded in 16 (or 32) bits, which scoring needs, and its linear modules are then quantized in memory, one at a time. So
every model that can be loaded can be quantized, including GGUF files. The modules that the plan trains fully stay as they are,
and so do the modules outside the decoder blocks (embeddings, output layer).
"""

from abc import ABC, abstractmethod
from collections.abc import Collection
from importlib.util import find_spec
from typing import ClassVar

import torch
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy, Strategy
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hybrid_lightning.adapters.candidates import find_candidates, linear_shape, without_lora
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.shared.configurable import Configurable

_BLOCK = 64  # neighbouring weights that share a scale in NF4


class Quantization(Configurable, ABC):
    """A format for frozen weights, computed by bitsandbytes.

    Raises:
        ConfigError: If bitsandbytes is not installed.
    """

    peft_flag: ClassVar[str]  # attribute of a model by which PEFT recognises such layers in it

    def __init__(self) -> None:
        if find_spec("bitsandbytes") is None:
            raise ConfigError(
                f"model.quantization={type(self).__name__} needs the package bitsandbytes, which is not installed; install it "
                "with pip install 'hybrid-lightning[quantization]'"
            )

    def takes(self, shape: tuple[int, int]) -> bool:
        """Whether a weight of this shape, (outputs, inputs), can be quantized. Others stay as they are."""
        return True

    @abstractmethod
    def layer(self, weight: Tensor, bias: nn.Parameter | None, device: torch.device) -> nn.Linear:
        """Make a linear layer with a frozen, quantized weight.

        Args:
            weight: [m, n] in 16 or 32 bits.
            bias: [m], kept as it is.
            device: The device that quantizes and then holds the weight.
        """


class NF4(Quantization):
    """4 bits per weight (NormalFloat of QLoRA, arXiv 2305.14314), and 0.13 for scales.

    The number of inputs must be a multiple of 64. If it is not, a block of weights with one scale spans two rows, which
    bitsandbytes' kernels for CPUs unpack wrongly (0.50.2).
    """

    peft_flag = "is_loaded_in_4bit"

    def takes(self, shape: tuple[int, int]) -> bool:
        """Whether each row consists of whole blocks."""
        return shape[1] % _BLOCK == 0

    def layer(self, weight: Tensor, bias: nn.Parameter | None, device: torch.device) -> nn.Linear:
        """Make a linear layer with a frozen weight in 4 bits."""
        from hybrid_lightning.model.quantized_linear import NF4Linear

        return NF4Linear(weight, bias, device)


def quantize_base(
    model: nn.Module, quantization: Quantization, full_modules: Collection[str], device: torch.device | None = None
) -> None:
    """Quantize the linear modules in the decoder blocks, except `full_modules`, before the adapter is applied.

    Modules are quantized in place, one at a time, on the device that will hold the weights; None leaves each on its own device.

    Raises:
        ConfigError: If nothing can be quantized.
    """
    plain = {name: module for name, module in find_candidates(model).items() if type(module) in (nn.Linear, Conv1D)}
    kept = {*full_modules, *without_lora(plain)}  # kernels read the weights of the latter as they are
    frozen = [name for name in plain if name not in kept]
    names = [name for name in frozen if quantization.takes(linear_shape(plain[name]))]
    nothing = f"model.quantization={type(quantization).__name__} has nothing to quantize"
    if not frozen:
        raise ConfigError(
            f"{nothing}, since the plan trains all {len(plain)} linear modules fully; lower adapter.budget.share, or set "
            "model.quantization=null"
        )
    if not names:
        raise ConfigError(
            f"{nothing}: it needs a number of inputs that is a multiple of {_BLOCK}, which no frozen module has; set "
            "model.quantization=null"
        )
    del plain  # it would keep every weight in memory until the end
    for name in names:
        module = model.get_submodule(name)
        weight, bias = module.get_parameter("weight").detach(), module.bias
        if isinstance(module, Conv1D):
            weight = weight.T.contiguous()
        assert bias is None or isinstance(bias, nn.Parameter)
        layer = quantization.layer(weight, bias, weight.device if device is None else device)
        model.set_submodule(name, layer.train(module.training))
    setattr(model, quantization.peft_flag, True)


def check_quantization(quantization: Quantization, strategy: Strategy) -> None:
    """Raise ConfigError if the strategy splits weights over devices: a quantized base cannot be split."""
    if isinstance(strategy, ParallelStrategy) and not isinstance(strategy, DDPStrategy):
        kind, name = type(quantization).__name__, type(strategy).__name__
        raise ConfigError(
            f"model.quantization={kind} does not work with {name}, which would separate packed weights from their scales; use "
            "trainer.strategy=ddp, where each device has the whole quantized base, or set model.quantization=null"
        )
