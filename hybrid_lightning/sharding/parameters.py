"""Parameters under sharding: the blocks that split a model, names of parameters, and optimizer state by name.

The names are the same whether or not the model is sharded. With names in place of torch's numbers, the optimizer state of a
checkpoint does not depend on how parameters are numbered or split. When torch loads a state, it takes whatever stands in place of
the numbers from the saved `param_groups`, so state by name can be loaded into any optimizer with the same groups.
"""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from hybrid_lightning.errors import CheckpointError, ModelError


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks of a model, which are the units of sharding: the modules in its outermost `ModuleList`s.

    Raises:
        ModelError: If the model has no decoder blocks.
    """
    blocks: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        within = any(name.startswith(f"{block}.") for block in blocks)
        if isinstance(module, nn.ModuleList) and not within:
            blocks |= {f"{name}.{number}": block for number, block in enumerate(module)}
    if not blocks:
        raise ModelError(f"{type(model).__name__} has no numbered decoder blocks, so it cannot be sharded; use DDP instead")
    return list(blocks.values())


def parameter_names(module: nn.Module) -> dict[nn.Parameter, str]:
    """Parameter -> its name."""
    return {parameter: name for name, parameter in module.named_parameters()}


def trained_names(module: nn.Module) -> set[str]:
    """Names of the trained parameters."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def plain_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer itself, without Lightning's wrapper."""
    inner: Optimizer = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
    return inner


def name_optimizer_state(state: dict[str, Any], optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
    """Replace the numbers of parameters in an optimizer's `state_dict` by their names.

    The state may be by name already, or empty on a rank that does not save.
    """
    if not state or any(isinstance(number, str) for group in state["param_groups"] for number in group["params"]):
        return state
    named: dict[Any, str] = {}
    for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        named |= {number: names[parameter] for number, parameter in zip(saved["params"], group["params"], strict=True)}
    groups = [{**saved, "params": [named[number] for number in saved["params"]]} for saved in state["param_groups"]]
    return {"state": {named[number]: value for number, value in state["state"].items()}, "param_groups": groups}


def check_names(state: Mapping[str, Any], optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> None:
    """Check that a saved state has the same parameters as an optimizer, in the same order; CheckpointError if it does not."""
    saved = [list(group["params"]) for group in state["param_groups"]]
    mine = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    if saved != mine:
        raise CheckpointError(
            "the checkpoint's optimizer state belongs to other parameters than the trained ones; give the checkpoint of a run "
            "that trained the same modules"
        )


def is_split_like(parameter: nn.Parameter, value: Any) -> bool:
    """Whether a value of the optimizer state is split like its parameter: moments are, counters are not."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == parameter.shape
