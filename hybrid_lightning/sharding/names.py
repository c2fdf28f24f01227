"""The names of parameters, the same whether or not the model is wrapped for sharding."""

from torch import nn

_WRAPPER = "_fsdp_wrapped_module."  # what FSDP1 puts into names


def parameter_names(module: nn.Module) -> dict[nn.Parameter, str]:
    """Parameter -> its name in the module as it was before sharding."""
    return {parameter: name.replace(_WRAPPER, "") for name, parameter in module.named_parameters()}


def trained_names(module: nn.Module) -> set[str]:
    """Names of the parameters that are trained."""
    return {name for parameter, name in parameter_names(module).items() if parameter.requires_grad}
