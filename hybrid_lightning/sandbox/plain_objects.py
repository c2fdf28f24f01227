"""Objects of the classes of set-up code, such as ListNode: plain data, by their attributes."""

from collections.abc import Iterable, Mapping
from typing import Any


def own_classes(names: Mapping[str, Any], module: str, tested: Iterable[str]) -> dict[str, type]:
    """Classes of the set-up code, without those that the program has to bring itself.

    Args:
        names: Namespace in which the set-up code has run.
        module: Name of that module.
        tested: Names that the program gives to the tests.
    """
    kinds = {name: value for name, value in names.items() if isinstance(value, type) and value.__module__ == module}
    return {name: kind for name, kind in kinds.items() if name not in tested}


def attributes(value: Any) -> dict[str, Any]:
    """Attributes of an object, those in slots included."""
    slots = [name for base in type(value).__mro__ for name in getattr(base, "__slots__", ()) if hasattr(value, name)]
    return {**{name: getattr(value, name) for name in slots if not name.startswith("__")}, **getattr(value, "__dict__", {})}


def is_computed(kind: type, name: str) -> bool:
    """Whether a class has a method of that name, or an attribute that it computes: data must not replace it."""
    held = next((type(vars(base)[name]) for base in kind.__mro__ if name in vars(base)), None)
    return hasattr(held, "__get__") and not hasattr(held, "__set__")
