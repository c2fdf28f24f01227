"""The settings of a run as plain data: collected for checkpoints, and flattened so that `resume.py` can compare them."""

import inspect
import sys
from collections.abc import Mapping
from enum import Enum
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.cli import SaveConfigCallback

from hybrid_lightning.configurable import Configurable, constructor_defaults, public_path
from hybrid_lightning.options import Option, options_of
from hybrid_lightning.policy.language import LanguageModule
from hybrid_lightning.rollout.prompt_order import prompts_digest

# Settings that are dicts and are given as a whole: what one key means depends on the others.
_UNDIVIDED = ("adapter.rank_pattern",)


def settings_of(trainer: Trainer, pl_module: LightningModule, adapter: Configurable) -> dict[str, Any]:
    """All settings of a run: of module, data, adapter and Trainer, and for a run of the command line everything in its config."""
    settings: dict[str, Any] = {"adapter": settings_of_adapter(adapter)}
    if isinstance(pl_module, LanguageModule):
        settings["model"] = _describe_part(pl_module, arguments_of(pl_module))
    data = getattr(trainer, "datamodule", None)  # which Lightning's Trainer has not before it runs
    if isinstance(data, Configurable):
        settings["data"] = _describe_part(data, data._init_args)
    for name, attribute in (("training prompts", "train_prompts"), ("validation prompts", "validation_prompts")):
        prompts = getattr(data, attribute, None) if trainer.state.fn == "fit" else None
        if prompts is not None:
            settings[name] = f"{len(prompts)} ({prompts_digest(prompts)[:12]})"
    config = next((c for c in trainer.callbacks if isinstance(c, SaveConfigCallback)), None)  # type: ignore[attr-defined]
    if config is not None:
        given = yaml.safe_load(config.parser.dump(config.config, skip_none=False))  # as in config.yaml
        settings |= {name: value for name, value in given.items() if name not in settings}
    settings["trainer"] = {**settings.get("trainer", {}), **_flags(trainer)}
    return settings


def arguments_of(pl_module: LightningModule) -> dict[str, Any]:
    """The saved arguments of a module's constructor, as plain data."""
    return {name: value for name, value in pl_module.hparams.items() if not name.startswith("_")}


def settings_of_adapter(adapter: Configurable) -> dict[str, Any]:
    """The settings of `HybridAdapterSetup`."""
    return _describe_part(adapter, adapter._init_args)


def option_above(name: str, settings: Mapping[str, Any]) -> Option | None:
    """What depends on a setting: as its own class declares it, or else the class above.

    Args:
        name: Name on the command line, such as `model.loss.clip_low`.
        settings: Flattened settings, which have the classes of modules and parts.

    Returns:
        None for an option that no class declares.
    """
    found = None
    place, *parts = name.split(".")
    for part in parts:
        kind = settings.get(place)
        kind = imported_class(kind) if isinstance(kind, str) else None
        found = (options_of(kind).get(part) if kind is not None else None) or found
        place = f"{place}.{part}"
    return found


def _describe_part(instance: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The class and the arguments of an object; for an argument that is None, the object that the constructor chose."""
    arguments = {**constructor_defaults(type(instance)), **arguments}
    # By `vars` and not by getattr: the data module has properties of such names, which would format the test split.
    chosen = {name: vars(instance).get(name) for name, value in arguments.items() if value is None}
    arguments |= {name: part for name, part in chosen.items() if isinstance(part, Configurable)}
    return {"class_path": public_path(type(instance)), "init_args": _plain(arguments)}


def _flags(trainer: Trainer) -> dict[str, Any]:
    """Flags of the Trainer that are plain values, with the values in effect: a limit that was not given has its default."""
    names = inspect.signature(Trainer.__init__).parameters.keys() - {"default_root_dir"}
    values = {name: getattr(trainer, name, None) for name in sorted(names)}
    values = {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
    flags = {name: value for name, value in values.items() if isinstance(value, (bool, int, float, str))}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):  # it changes the flag from epoch to epoch
            flags["accumulate_grad_batches"] = str(callback.scheduling)
    return flags


def _plain(value: Any) -> Any:
    """A value as numbers, text, lists and dicts; any other object as its class."""
    if isinstance(value, Configurable):
        return {"class_path": public_path(type(value)), "init_args": _plain(value._init_args)}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return {"class_path": public_path(value if isinstance(value, type) else type(value)), "init_args": {}}


def flatten_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested settings: name on the command line -> value; the value of an object is its class."""
    found: dict[str, Any] = {}

    def put(name: str, value: Any) -> None:
        if name in _UNDIVIDED:
            found[name] = value or None
        elif isinstance(value, Mapping):
            items = value
            if "class_path" in value:
                kind = imported_class(str(value["class_path"]))
                found[name] = value["class_path"] if kind is None else public_path(kind)
                items = {**({} if kind is None else _plain(constructor_defaults(kind))), **(value.get("init_args") or {})}
            for key, item in items.items():
                put(f"{name}.{key}", item)
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            for number, item in enumerate(value):
                put(f"{name}.{number}", item)
        else:
            found[name] = value

    for name, value in settings.items():
        put(name, value)
    return found


def changed_settings(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ from their defaults: name on the command line -> (value, default), of an object its class.

    Args:
        settings: Nested settings.
        defaults: Those of the command line; the arguments of a class that it does not name have those of the constructor.
    """
    found: dict[str, tuple[Any, Any]] = {}

    def put(name: str, value: Any, default: Any) -> None:
        if isinstance(value, Mapping) and "class_path" in value:
            path, kind = str(value["class_path"]), imported_class(str(value["class_path"]))
            path = path if kind is None else public_path(kind)
            given = default if isinstance(default, Mapping) else {}
            same = given.get("class_path") == path
            if not same:
                found[name] = (path, given.get("class_path") if given else default)
            usual = {**({} if kind is None else _plain(constructor_defaults(kind))), **((same and given.get("init_args")) or {})}
            for key, item in (value.get("init_args") or {}).items():
                put(f"{name}.{key}", item, usual.get(key))
        elif isinstance(value, Mapping) and name not in _UNDIVIDED and (isinstance(default, Mapping) or not default):
            for key, item in value.items():
                put(f"{name}.{key}" if name else key, item, (default or {}).get(key))
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            for number, item in enumerate(value):
                put(f"{name}.{number}", item, None)
        elif value != default:
            found[name] = (value, default)

    put("", settings, defaults)
    return found


def imported_class(path: str) -> type | None:
    """The class of a path if its module is already imported: a checkpoint must not cause an import."""
    module, _, name = path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else None
