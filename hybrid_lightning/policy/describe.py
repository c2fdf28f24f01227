"""Constructor arguments as plain data, so that a checkpoint can rebuild a module that was made in Python."""

import functools
from typing import Any

from hybrid_lightning.configurable import Configurable, public_path, to_plain
from hybrid_lightning.errors import ConfigError


def describe_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Replace parts, classes and partial classes by `{"class_path": ..., "init_args": ...}`, at any depth.

    Raises:
        ConfigError: If a value cannot be written into a checkpoint.
    """
    return {name: _describe(name, value) for name, value in arguments.items()}


def _describe(name: str, value: Any) -> Any:
    if isinstance(value, Configurable):
        return _describe(name, value.to_config())
    if isinstance(value, type):
        _check_importable(name, value.__qualname__)
        return {"class_path": public_path(value), "init_args": {}}
    if isinstance(value, functools.partial):
        # jsonargparse, which rebuilds a module from a checkpoint, has the class among the positional arguments.
        classes = [item for item in (value.func, *value.args) if isinstance(item, type)]
        if len(classes) == 1:
            return {**_describe(name, classes[0]), "init_args": describe_arguments(value.keywords)}
    if isinstance(value, dict):
        _check_importable(name, str(value.get("class_path")))
        return {key: _describe(name, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_describe(name, item) for item in to_plain(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(
        f"{name}={value!r} cannot be written into a checkpoint; give a class, functools.partial(Class, ...), a subclass of "
        "hybrid_lightning.configurable.Configurable, or plain numbers and strings"
    )


def _check_importable(name: str, path: str) -> None:
    if "<locals>" in path:
        raise ConfigError(
            f"{name}: the class {path} cannot be written into a checkpoint, since it is defined within a function; define it at "
            "the top level of a module"
        )
