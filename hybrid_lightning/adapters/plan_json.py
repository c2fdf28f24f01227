"""The JSON form of a plan: its fields and their types, its digest, and a layout that a person can read and edit."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from hybrid_lightning.errors import PlanError

FORMAT = 1  # version of the fields below; a plan of another one is refused
Fields = Mapping[str, tuple[type, ...]]  # name -> allowed types
_NULL = type(None)
PLAN_FIELDS: Fields = {
    "digest": (str, _NULL),
    "format": (int,),
    "model": (str,),
    "revision": (str, _NULL),
    "model_digest": (str,),
    "lora": (dict,),
    "budget": (dict,),
    "scorer": (dict, _NULL),
    "calibration": (dict,),
    "seed": (int, _NULL),
    "candidates": (list,),
}
LORA_FIELDS: Fields = {
    "rank": (int,),
    "alpha": (int, float),
    "dropout": (int, float),
    "use_dora": (bool,),
    "use_rslora": (bool,),
}
MODULE_FIELDS: Fields = {
    "name": (str,),
    "shape": (list,),
    "parameters": (int,),
    "score": (int, float, _NULL),
    "mode": (str,),
    "rank": (int, _NULL),
}
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


def checked(data: Any, fields: Fields, source: str) -> dict[str, Any]:
    """Check the names and types of a JSON object's fields.

    Args:
        data: The object.
        fields: Name -> allowed types.
        source: Where the object comes from, for the error message.

    Returns:
        A copy of the object.

    Raises:
        PlanError: If one is wrong; the message names the first.
    """
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


def _has_type(value: Any, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool):  # bool is a subclass of int
        return bool in kinds
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, kinds)
