"""`Part`: base of everything that a config swaps by class (losses, rewards, scorers, samplers, advantage estimators, ...).

A part remembers the arguments that it was built with, so that a checkpoint and the TensorBoard page can describe it as the
same `class_path` / `init_args` pair that a YAML file holds, whether it was built by the command line or in Python.
"""

import inspect
from typing import Any, Self


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
        cls = type(self)
        return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": to_plain(self._init_args)}


def to_plain(value: Any) -> Any:
    """Replace every `Part` inside lists, tuples and dicts by its config."""
    if isinstance(value, Part):
        return value.to_config()
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value
