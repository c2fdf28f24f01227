"""The settings of a run as plain data: collected for checkpoints, and flattened so that `resume.py` can compare them."""

import inspect
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.cli import SaveConfigCallback

from hybrid_lightning.callbacks.run_folder import find_callback
from hybrid_lightning.rollout.prompt_order import prompts_digest
from hybrid_lightning.shared.configurable import Configurable, constructor_defaults, imported_class, public_path, to_plain
from hybrid_lightning.training.module import LanguageModule

# Settings that are dicts and are replaced as a whole: the meaning of one key depends on the others.
_UNDIVIDED = ("adapter.rank_pattern",)


def settings_of(trainer: Trainer, pl_module: LightningModule, adapter: Configurable) -> dict[str, Any]:
    """All settings of a run: of module, data, adapter and Trainer, and for a command-line run everything in its config."""
    settings: dict[str, Any] = {"adapter": describe_part(adapter, adapter._init_args)}
    if isinstance(pl_module, LanguageModule):
        settings["model"] = describe_part(pl_module, arguments_of(pl_module))
    data = getattr(trainer, "datamodule", None)  # Lightning's Trainer does not have it before it runs
    if isinstance(data, Configurable):
        settings["data"] = describe_part(data, data._init_args)
    for name, attribute in (("training prompts", "train_prompts"), ("validation prompts", "validation_prompts")):
        prompts = getattr(data, attribute, None) if trainer.state.fn == "fit" else None
        if prompts is not None:
            settings[name] = f"{len(prompts)} ({prompts_digest(prompts)[:12]})"
    config = find_callback(trainer, SaveConfigCallback)
    if config is not None:
        given = yaml.safe_load(config.parser.dump(config.config, skip_none=False))  # as in config.yaml
        settings |= {name: value for name, value in given.items() if name not in settings}
    settings["trainer"] = {**settings.get("trainer", {}), **_flags(trainer)}
    return settings


def arguments_of(pl_module: LightningModule) -> dict[str, Any]:
    """The saved arguments of a module's constructor, as plain data."""
    return {name: value for name, value in pl_module.hparams.items() if not name.startswith("_")}


def describe_part(instance: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The class and arguments of an object; an argument that is None becomes the object that the constructor chose."""
    arguments = {**constructor_defaults(type(instance)), **arguments}
    # By `vars` instead of getattr: the data module has properties of such names, which would format the test split.
    chosen = {name: vars(instance).get(name) for name, value in arguments.items() if value is None}
    arguments |= {name: part for name, part in chosen.items() if isinstance(part, Configurable)}
    return {"class_path": public_path(type(instance)), "init_args": _plain(arguments)}


def _flags(trainer: Trainer) -> dict[str, Any]:
    """Trainer flags that are plain values, with the values in effect: a limit that was not given has its default."""
    names = inspect.signature(Trainer.__init__).parameters.keys() - {"default_root_dir"}
    values = {name: getattr(trainer, name, None) for name in sorted(names)}
    values = {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
    flags = {name: value for name, value in values.items() if isinstance(value, (bool, int, float, str))}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):  # changes the flag from epoch to epoch
            flags["accumulate_grad_batches"] = str(callback.scheduling)
    return flags


def _plain(value: Any) -> Any:
    """A value as numbers, text, lists and dicts; any other object becomes its class."""
    return to_plain(
        value, lambda other: {"class_path": public_path(other if isinstance(other, type) else type(other)), "init_args": {}}
    )


def flatten_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested settings: name on the command line -> value; an object's value is its class."""
    return {name: value for section in settings.items() for name, value, _ in _flattened(*section)}


def changed_settings(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Settings that differ from their defaults: name on the command line -> [value, default]; an object's value is its class.

    `defaults` are the command line's defaults; class arguments missing there have the constructor's defaults.
    """
    expected, found = flatten_settings(defaults), dict[str, list[Any]]()
    others: tuple[str, ...] = ()  # prefixes of the arguments of classes that differ from the default class
    for section in settings.items():
        for name, value, usual in _flattened(*section):
            default = usual if name.startswith(others) else expected.get(name, usual)
            if value != default:
                found[name] = [value, default]
                others += (f"{name}.",)
    return found


def _flattened(name: str, value: Any, usual: Any = None) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, value and default for everything in a setting; the default comes from the class's constructor, else None."""
    if name in _UNDIVIDED:
        yield name, value or None, usual
    elif isinstance(value, Mapping):
        defaults: dict[str, Any] = {}
        if "class_path" in value:
            kind = imported_class(str(value["class_path"]))
            usual = usual.get("class_path") if isinstance(usual, Mapping) else usual
            yield name, value["class_path"] if kind is None else public_path(kind), usual
            defaults = {} if kind is None else _plain(constructor_defaults(kind))
            value = {**defaults, **(value.get("init_args") or {})}
        for key, item in value.items():
            yield from _flattened(f"{name}.{key}", item, defaults.get(key))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value):
            yield from _flattened(f"{name}.{number}", item)
    else:
        yield name, value, usual
