"""`Configurable`: base class of everything that a config swaps by class, such as losses, rewards, scorers and samplers.

An object remembers the arguments that it was built with, so that a checkpoint and TensorBoard can describe it by the same
`class_path` and `init_args` as a YAML file, whether it was built by the command line or in Python.

A class is named by its public path, such as hybrid_lightning.losses.GSPOLoss, so that files can move.
"""

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Self

_PATH = re.compile(r"hybrid_lightning\.\w+(?:\.\w+)*\.[A-Z]\w*")  # the path of a class

# Packages whose classes are named by the package alone. Earlier versions also wrote the file
# (hybrid_lightning.losses.gspo.GSPOLoss).
ROOMS = frozenset(
    {"adapters", "advantages", "callbacks", "data", "export", "losses", "metrics", "policy", "rewards", "rollout", "sharding"}
)


class Configurable:
    """Base class that records the arguments of the constructor.

    Example:
        >>> class Clip(Configurable):
        ...     def __init__(self, low: float, high: float = 0.2) -> None:
        ...         self.low, self.high = low, high
        >>> Clip(0.1).to_config()["init_args"]
        {'low': 0.1}
    """

    _init_args: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Record the arguments; `__init__` gets them as usual."""
        self = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind(self, *args, **kwargs)
        except TypeError:  # wrong arguments, for which the constructor raises; or a copy, which restores the attributes itself
            return self
        arguments = dict(list(bound.arguments.items())[1:])
        for parameter in inspect.signature(cls.__init__).parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(parameter.name, {}))
        self._init_args = arguments
        return self

    def to_config(self) -> dict[str, Any]:
        """Describe this object as `{"class_path": ..., "init_args": {...}}`, and nested objects likewise."""
        return {"class_path": public_path(type(self)), "init_args": to_plain(self._init_args)}


def to_plain(value: Any) -> Any:
    """Replace every `Configurable` in nested lists, tuples and dicts by its config."""
    if isinstance(value, Configurable):
        return value.to_config()
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


def public_path(kind: type) -> str:
    """The path from which a class should be imported: the outermost package that has it, so that files in it can move.

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


def with_public_paths(value: Any) -> Any:
    """A config, or a part of one, in which all our classes have their public paths, even if an earlier version wrote it.

    Example:
        >>> with_public_paths({"class_path": "hybrid_lightning.losses.gspo_token.GSPOTokenLoss"})
        {'class_path': 'hybrid_lightning.losses.GSPOTokenLoss'}
    """
    if isinstance(value, dict):
        return {key: with_public_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_public_paths(item) for item in value]
    if not isinstance(value, str) or not _PATH.fullmatch(value):
        return value
    package, room, *_, name = value.split(".")
    return f"{package}.{room}.{name}" if room in ROOMS else value


def public_names(package: str, names: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Make the `__getattr__` of a package that imports a module only when one of its names is first used.

    Classes so get short paths that do not change when files move, and code that needs only torch does not wait for PEFT.

    Args:
        package: Full name of the package.
        names: Module in the package -> its public names.
    """
    modules = {name: module for module, of_module in names.items() for name in of_module}

    def find(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{modules[name]}"), name)

    return find
