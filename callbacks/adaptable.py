"""`Adaptable`: what `HybridAdapterSetup` asks of a LightningModule.

Two names are enough, so that supervised and preference training can be adapted as well as a policy:

- `adapter_attribute: str`, the name of the attribute that holds the model, and
- `calibration_losses(num_prompts: int | None)`, an iterable of scalar losses that computes them afresh each time it is iterated;
  the mean of their gradients scores the modules. None leaves the number of prompts (or examples) to the module, which should
  take about what one training step has. An attribute `info` of it (a dict of plain values) is kept in the plan.
"""

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from hybrid_lightning.errors import ConfigError


@runtime_checkable
class Adaptable(Protocol):
    """What a LightningModule has to offer."""

    adapter_attribute: str

    def calibration_losses(self, num_prompts: int | None) -> Iterable[Tensor]:
        """Scalar losses at the start policy; None: of as many prompts as the module chooses."""
        ...


def check_adaptable(pl_module: LightningModule) -> None:
    """Make sure that a module can be adapted, and build its model if it builds it late.

    Raises:
        ConfigError: If the module does not follow the protocol.
    """
    name = type(pl_module).__name__
    if not isinstance(pl_module, Adaptable):
        raise ConfigError(
            f"HybridAdapterSetup cannot adapt {name}: it needs an attribute adapter_attribute (the name of the model's "
            "attribute) and a method calibration_losses(num_prompts)"
        )
    if not _has_model(pl_module):
        pl_module.configure_model()  # not where the model is there: a module may split it over processes in this hook
    if not _has_model(pl_module):
        raise ConfigError(
            f"{name}.adapter_attribute is {pl_module.adapter_attribute!r}, but there is no such module; give the name of the "
            "attribute that holds the model"
        )


def _has_model(pl_module: LightningModule) -> bool:
    return isinstance(getattr(pl_module, str(pl_module.adapter_attribute), None), nn.Module)
