"""`Adaptable`: the protocol that a LightningModule must follow so that `HybridAdapterSetup` can adapt it."""

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from hybrid_lightning.adapters.plan import AdapterPlan
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.policy.adaptation import AdaptedModule


@runtime_checkable
class Adaptable(Protocol):
    """What a LightningModule must have to be adapted, be it a policy or a module for supervised or preference training."""

    adapter_attribute: str  # name of the attribute that holds the model

    def calibration_losses(self, num_prompts: int | None) -> Iterable[Tensor]:
        """Scalar losses of the start policy, computed anew each time: modules are scored by the mean of their gradients.

        None leaves the number of prompts (or examples) to the module, which should take about as many as one training step has.
        If the iterable has an attribute `info` (a dict of plain values), it is kept in the plan.
        """
        ...


def check_adaptable(pl_module: LightningModule) -> None:
    """Check that a module can be adapted, and build its model if that is done in `configure_model`.

    Raises:
        ConfigError: If the module does not follow the protocol.
    """
    name = type(pl_module).__name__
    if not isinstance(pl_module, Adaptable):
        raise ConfigError(
            f"HybridAdapterSetup cannot adapt {name}; give it an attribute adapter_attribute (the name of the model's "
            "attribute) and a method calibration_losses(num_prompts)"
        )
    if not _has_model(pl_module):
        pl_module.configure_model()  # only if there is no model yet: this hook may also split a model over processes
    if not _has_model(pl_module):
        raise ConfigError(
            f"{name}.adapter_attribute is {pl_module.adapter_attribute!r}, but there is no such module; give the name of the "
            "attribute that holds the model"
        )


def model_of(pl_module: LightningModule) -> nn.Module:
    """The model of a module that follows the protocol: what its `adapter_attribute` names."""
    model = getattr(pl_module, str(pl_module.adapter_attribute))
    assert isinstance(model, nn.Module)
    return model


def applied_plan(pl_module: LightningModule) -> AdapterPlan | None:
    """The plan by which a module is adapted; of a module that knows none, the one that `HybridAdapterSetup` left in `plan`."""
    plan = pl_module.plan if isinstance(pl_module, AdaptedModule) else vars(pl_module).get("plan")
    return plan if isinstance(plan, AdapterPlan) else None


def _has_model(pl_module: LightningModule) -> bool:
    return isinstance(getattr(pl_module, str(pl_module.adapter_attribute), None), nn.Module)
