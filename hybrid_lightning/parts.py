"""`Part`: base of everything that a config swaps by class (losses, rewards, scorers, samplers, advantage estimators, ...).

A part remembers the arguments that it was built with, so that a checkpoint and the TensorBoard page can describe it as the
same `class_path` / `init_args` pair that a YAML file holds, whether it was built by the command line or in Python.
"""

import inspect
import sys
from typing import Any, Self

# Modules of earlier versions, under which classes stand in their configs, checkpoints and plans -> where those are now.
MOVED = {
    **{
        f"hybrid_lightning.adapters.scorers.{name}": "hybrid_lightning.adapters.scorers"
        for name in ("base", "chance", "magnitude", "preconditioned", "probe", "snr", "tail")
    },
    **{
        f"hybrid_lightning.advantages.{name}": "hybrid_lightning.advantages"
        for name in ("base", "batch_std", "group", "group_mean", "leave_one_out", "per_reward")
    },
}


class Part:
    """Base class that records constructor arguments.

    Example:
        >>> class Clip(Part):
        ...     def __init__(self, low: float, high: float = 0.2) -> None:
        ...         self.low, self.high = low, high
        >>> Clip(0.1).to_config()["init_args"]
        {'low': 0.1}
    """

    _init_args: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note the arguments; `__init__` gets them as usual."""
        self = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind(self, *args, **kwargs)
        except TypeError:  # wrong arguments (the constructor says so next), or a copy, which restores the attributes itself
            return self
        arguments = dict(list(bound.arguments.items())[1:])
        for parameter in inspect.signature(cls.__init__).parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(parameter.name, {}))
        self._init_args = arguments
        return self

    def to_config(self) -> dict[str, Any]:
        """Describe this part as `{"class_path": ..., "init_args": {...}}`, nested parts included."""
        return {"class_path": public_path(type(self)), "init_args": to_plain(self._init_args)}


def to_plain(value: Any) -> Any:
    """Replace every `Part` inside lists, tuples and dicts by its config."""
    if isinstance(value, Part):
        return value.to_config()
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


def public_path(kind: type) -> str:
    """Where a class is to be imported from: the first package on its way that has it, so that files in it can move.

    Example:
        >>> from hybrid_lightning.losses import GSPOLoss
        >>> public_path(GSPOLoss)
        'hybrid_lightning.losses.GSPOLoss'
    """
    names = kind.__module__.split(".")
    for end in range(1, len(names)):
        place = ".".join(names[:end])
        if getattr(sys.modules.get(place), kind.__qualname__, None) is kind:
            return f"{place}.{kind.__qualname__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def translated(value: Any) -> Any:
    """A config, or a part of one, in which classes of earlier versions are named as they are now (see `MOVED`)."""
    if isinstance(value, dict):
        return {key: translated(item) for key, item in value.items()}
    if isinstance(value, list):
        return [translated(item) for item in value]
    if isinstance(value, str) and value.startswith("hybrid_lightning."):
        module, _, name = value.rpartition(".")
        return f"{MOVED[module]}.{name}" if module in MOVED else value
    return value
