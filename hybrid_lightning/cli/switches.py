"""What a class keeps of the options of the class before it, when a later config or option names another class.

jsonargparse keeps every option whose name the new class has, too: ExactMatch's `pattern` would become JudgeReward's, which finds
grades with it. Here a class keeps an option only if it means the same for both classes (see `_means_the_same`).
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jsonargparse import Namespace, _typehints

from hybrid_lightning.errors import shorten
from hybrid_lightning.shared.configurable import constructor_defaults, imported_class

_LIBRARIES = ("lightning", "torch", "bitsandbytes")
_MISSING = inspect.Parameter.empty


@dataclass(frozen=True)
class Switched:
    """An option of a class, with a value other than its default, when another class was named in its place."""

    before: type
    after: type
    name: str
    value: Any
    kept: bool  # whether the new class took it over


@contextmanager
def switched_options() -> Iterator[list[Switched]]:
    """Context in which a class keeps only options that mean the same; yields the list of all options of replaced classes."""
    theirs = _typehints.discard_init_args_on_class_path_change  # no class or parser is asked what to keep
    rule = theirs if isinstance(theirs, _Rule) else _Rule(theirs)  # ours for the arguments of a class, within a command's
    _typehints.discard_init_args_on_class_path_change = rule
    try:
        yield rule.found
    finally:
        _typehints.discard_init_args_on_class_path_change = theirs


def describe(switched: Sequence[Switched], config: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """A line for each class in a command's config that kept or lost options of the class before it.

    Leaves out options that `defaults`, the command's config without any file, has with the same value.
    """
    without, lines = dict(_classes(defaults)), []
    for key, spec in _classes(config):
        options, default = spec.get("init_args") or {}, without.get(key, {})
        entries = [entry for entry in switched if entry.after is imported_class(spec["class_path"])]
        for before in dict.fromkeys(entry.before for entry in entries):
            unchosen = default.get("init_args", {}) if imported_class(default.get("class_path", "")) is before else {}
            kept: dict[str, Any] = {}
            lost: dict[str, Any] = {}
            for entry in entries:
                if entry.before is before and entry.value != unchosen.get(entry.name, _MISSING):
                    is_now = options.get(entry.name, _MISSING) == entry.value
                    if entry.kept == is_now:
                        (kept if is_now else lost)[entry.name] = entry.value
            parts = [f"{verb} {_listed(values)}" for verb, values in (("keeps", kept), ("drops", lost)) if values]
            if parts:
                place, name = key.replace(".init_args", ""), entries[0].after.__name__
                lines.append(f"{place}: {name} in place of {before.__name__} {' and '.join(parts)}")
    return lines


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={shorten(value)}" for name, value in values.items())


def _classes(value: Any, key: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Key and value of each class in a config, such as model.init_args.reward."""
    if isinstance(value, Mapping):
        if isinstance(value.get("class_path"), str):
            yield key, value
        for name, item in value.items():
            yield from _classes(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _classes(item, f"{key}[{number}]")


class _Rule:
    """Removes options of the class before, in place; jsonargparse gives the rest to the new class.

    Args:
        theirs: The function of jsonargparse that this replaces, which removes what the new class does not take.
    """

    def __init__(self, theirs: Callable[[Any, Any, Any], None]) -> None:
        self.theirs = theirs
        self.found: list[Switched] = []

    def __call__(self, parser_or_action: Any, before: Any, after: Any) -> None:
        options: Any = before.get("init_args") if isinstance(before, Namespace) else None
        old, new = (imported_class(str(spec["class_path"])) if options else None for spec in (before, after))
        if old is None or new is None or old is new:
            return self.theirs(parser_or_action, before, after)
        values, defaults = dict(vars(options)), constructor_defaults(old)
        for name, value in values.items():
            if not _means_the_same(name, value, old, new):
                options.pop(name)
        self.theirs(parser_or_action, before, after)
        for name, value in values.items():
            plain = value.as_dict() if isinstance(value, Namespace) else value
            if plain != defaults.get(name, _MISSING):
                self.found.append(Switched(old, new, name, plain, kept=name in options))


def _means_the_same(name: str, value: Any, before: type, after: type) -> bool:
    """Whether two classes mean the same by an option.

    They do if both have it from one class, and not with different defaults: `kl_coef` of all losses, but not the clip ranges of
    GRPO and GSPO. Classes of libraries, such as optimizers and loggers, call the same things by the same names. Their defaults
    differ, so only other values are kept.
    """
    old, new = (constructor_defaults(part).get(name, _MISSING) for part in (before, after))
    if is_of_a_library(before) and is_of_a_library(after):
        return bool(value != old)
    first = _first_with(name, before)
    return first is not None and first is _first_with(name, after) and (old == new or _MISSING in (old, new))


def _first_with(name: str, part: type) -> type | None:
    """The most basic class whose constructor has an argument of this name."""
    found = [base for base in part.__mro__ if name in inspect.signature(base.__init__).parameters]  # type: ignore[misc]
    return found[-1] if found else None


def is_of_a_library(part: type) -> bool:
    """Whether a class has a library's constructor, as our Trainer has Lightning's."""
    maker = next(vars(base)["__init__"] for base in part.__mro__ if "__init__" in vars(base))
    return getattr(maker, "__module__", "").partition(".")[0] in _LIBRARIES
