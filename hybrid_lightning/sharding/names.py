"""The names of parameters, the same whether or not the model is wrapped for sharding."""

from torch import nn

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # what FSDP1 and modules within it put into names


def parameter_names(module: nn.Module) -> dict[nn.Parameter, str]:
    """Parameter -> its name in the module as it was before sharding."""
    return {parameter: plain_name(name) for name, parameter in module.named_parameters()}


def plain_name(name: str) -> str:
    """The name of a parameter without those of wrappers."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def trained_names(module: nn.Module) -> set[str]:
    """Names of the parameters that are trained."""
    return {name for parameter, name in parameter_names(module).items() if parameter.requires_grad}
