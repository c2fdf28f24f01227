"""`Configurable`: base class of everything that a config swaps by class, such as losses, rewards, scorers and samplers.

An object records the arguments that it was built with. A checkpoint and TensorBoard can then describe it by the same `class_path`
and `init_args` as a YAML file, whether it was built by the command line or in Python.

Classes have public paths, such as hybrid_lightning.losses.GSPOLoss, so that files can move.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, Self

from hybrid_lightning.errors import ConfigError


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
        except TypeError:  # wrong arguments, for which the constructor will raise; or a copy, which restores its attributes
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


def to_plain(value: Any, other: Callable[[Any], Any] = lambda value: value) -> Any:
    """Replace every `Configurable` in nested lists, tuples and dicts by its config, and every function by its path.

    `other` converts any remaining object except numbers and text.
    """
    if isinstance(value, Configurable):
        return to_plain(value.to_config(), other)
    if inspect.isfunction(value):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, Mapping):
        return {key: to_plain(item, other) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item, other) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else other(value)


def constructor_defaults(kind: type) -> dict[str, Any]:
    """The defaults of all arguments of a class, including the arguments that it passes to its parents through `**kwargs`.

    Example:
        >>> class Inner:
        ...     def __init__(self, low: float = 0.1) -> None: ...
        >>> class Outer(Inner):
        ...     def __init__(self, high: float = 0.2, **kwargs) -> None: ...
        >>> constructor_defaults(Outer)
        {'high': 0.2, 'low': 0.1}
    """
    defaults: dict[str, Any] = {}
    for parent in kind.__mro__:
        if "__init__" in vars(parent):
            parameters = inspect.signature(parent.__init__).parameters.values()  # type: ignore[misc]
            of_parent = {entry.name: entry.default for entry in parameters if entry.default is not inspect.Parameter.empty}
            defaults |= {name: value for name, value in of_parent.items() if name not in defaults}
            if all(entry.kind is not inspect.Parameter.VAR_KEYWORD for entry in parameters):
                break
    return defaults


def describe_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments as plain data, from which a checkpoint can rebuild objects that were made in Python.

    Replaces configurables, classes and partial classes by `{"class_path": ..., "init_args": ...}`, at any depth.

    Raises:
        ConfigError: If a value cannot be written into a checkpoint.
    """
    return {name: _describe(name, value) for name, value in arguments.items()}


def _describe(name: str, value: Any) -> Any:
    if isinstance(value, Configurable):
        value = value.to_config()
    elif isinstance(value, type):
        value = {"class_path": public_path(value), "init_args": {}}
    elif isinstance(value, functools.partial):
        # jsonargparse, which rebuilds a module from a checkpoint, has the class among the positional arguments.
        classes = [item for item in (value.func, *value.args) if isinstance(item, type)]
        if len(classes) == 1:
            value = {"class_path": public_path(classes[0]), "init_args": value.keywords}
    if isinstance(value, dict):
        path = str(value.get("class_path"))
        if "<locals>" in path:
            raise ConfigError(
                f"{name}: the class {path} cannot be written into a checkpoint, since it is defined inside a function; define it "
                "at the top level of a module"
            )
        return {key: _describe(name, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_describe(name, item) for item in to_plain(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(
        f"{name}={value!r} cannot be written into a checkpoint; give a class, functools.partial(Class, ...), a subclass of "
        "hybrid_lightning.shared.configurable.Configurable, or plain numbers and strings"
    )


def lost_paths(config: Any) -> list[str]:
    """Paths in a config that another process cannot resolve: functions and classes of a script, or without a name.

    Example:
        >>> lost_paths({"class_path": "__main__.Mine", "init_args": {"rewards": [{"function": "tasks.<lambda>"}]}})
        ['__main__.Mine', 'tasks.<lambda>']
    """
    if isinstance(config, Mapping):
        own = [str(config[key]) for key in ("class_path", "function") if key in config]
        lost = [path for path in own if path.startswith("__main__.") or "<" in path]
        return lost + [path for value in config.values() for path in lost_paths(value)]
    return [path for value in config for path in lost_paths(value)] if isinstance(config, list) else []


def public_path(kind: type) -> str:
    """The path from which to import a class: the outermost package that has it, so that its files can move.

    Example:
        >>> from hybrid_lightning.losses import GSPOLoss
        >>> public_path(GSPOLoss)
        'hybrid_lightning.losses.GSPOLoss'
    """
    names = kind.__module__.split(".")
    places = [".".join(names[:end]) for end in range(1, len(names))]
    if names[0] == "hybrid_lightning":
        del places[0]  # files name the subpackage
    for place in places:
        if getattr(sys.modules.get(place), kind.__qualname__, None) is kind:
            return f"{place}.{kind.__qualname__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def imported_class(path: str) -> type | None:
    """The class of a path if its module is already imported: a checkpoint must not cause an import."""
    module, _, name = path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else None


def as_call(config: Mapping[str, Any]) -> str:
    """Format the config of a class as a call.

    Example:
        >>> as_call({"class_path": "hybrid_lightning.adapters.ModuleBudget", "init_args": {"share": 0.1}})
        'ModuleBudget(share=0.1)'
    """
    if "class_path" not in config:  # written by hand
        return str(dict(config))
    arguments = ", ".join(f"{name}={value!r}" for name, value in config.get("init_args", {}).items())
    return f"{config['class_path'].rpartition('.')[2]}({arguments})"
