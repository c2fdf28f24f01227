"""The JSON form of a plan: the types of its fields, its digest, and a layout that a person can read and edit."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hybrid_lightning.errors import PlanError

FORMAT = 1  # version of the fields; a plan of another one is refused
_NULL = type(None)
_OPTIONAL = {"digest", "rank"}


def plain(value: Any) -> Any:
    """Reduce a value to JSON's types, exactly as it would be read back from a file.

    Raises:
        PlanError: If a number is not finite.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False, default=str))
    except ValueError as error:
        raise PlanError(f"a plan cannot hold infinite numbers or nan ({error}); look for them in its scores") from error


def content_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of a plan in plain types, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def checked(data: Any, kind: type, source: str, more: Mapping[str, tuple[type, ...]] | None = None) -> dict[str, Any]:
    """Check the names and types of a JSON object's fields.

    Args:
        data: The object.
        kind: Data class whose fields it has.
        source: Where the object comes from, for the error message.
        more: Name -> allowed types of fields that it has besides.

    Returns:
        A copy of the object.

    Raises:
        PlanError: If one is wrong; the message names the first.
    """
    fields = {**(more or {}), **{name: _json_types(hint) for name, hint in get_type_hints(kind).items()}}
    if not isinstance(data, Mapping):
        raise PlanError(f"{source} is a {type(data).__name__}; it must be a JSON object")
    for name in fields:
        if name not in data and name not in _OPTIONAL:
            raise PlanError(f'{source} lacks the field "{name}", which every plan has; make it anew')
    for name, value in data.items():
        if name not in fields:
            raise PlanError(f'{source} has an unknown field "{name}"; remove it (known are {", ".join(fields)})')
        if not _has_type(value, fields[name]):
            expected = " or ".join("null" if kind is _NULL else kind.__name__ for kind in fields[name])
            raise PlanError(f'{source}: "{name}" is {json.dumps(value, default=str)[:60]}; it must be {expected}')
    if "format" in fields and data["format"] != FORMAT:
        raise PlanError(f"{source} has format {data['format']}, and this version reads {FORMAT}; make the plan anew")
    return dict(data)


def dumps(content: Mapping[str, Any]) -> str:
    """Write a plan as JSON with one line for each field and for each entry of a list."""
    lines = []
    for name, value in content.items():
        if isinstance(value, list):
            entries = ",\n".join(f"    {json.dumps(entry)}" for entry in value)
            lines.append(f"  {json.dumps(name)}: [\n{entries}\n  ]")
        else:
            lines.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _json_types(hint: Any) -> tuple[type, ...]:
    """Types of JSON's values for a type of Python."""
    origin = get_origin(hint)
    if origin is UnionType:
        return tuple(kind for part in get_args(hint) for kind in _json_types(part))
    if origin is tuple:
        return (list,)
    if origin is Literal:
        return (str,)
    if is_dataclass(hint) or origin is dict:
        return (dict,)
    return (int, float) if hint is float else (hint,)


def _has_type(value: Any, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool):  # bool is a subclass of int
        return bool in kinds
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, kinds)
