"""Values as bytes between the tests' process and the program's process: plain data, never code, and never a class of the sender.

A value is a JSON list: the value itself, then every container that it refers to as `[tag, item, ...]`. An item is a JSON scalar,
or `[n]` for container number n. So nesting has no depth limit, and shared and circular references stay as they are.

Objects of classes in the set-up code, such as ListNode, are plain data as well: their attributes are sent. All other
objects stay in their process, and are sent as a number (`Remote`).
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any

MAX_BYTES = 64 * 2**20  # of a message
Unknown = Callable[[Any], int]  # object that is not plain data -> number by which its process finds it again
_BUILTINS: dict[str, type] = {
    kind.__name__: kind for kind in (bool, bytes, complex, dict, float, frozenset, int, list, object, set, str, tuple)
}
_BY_VALUE: dict[str, Callable[[Any], list[Any]]] = {  # class of the standard library -> arguments that make an equal object
    "complex": lambda value: [value.real, value.imag],
    "Decimal": lambda value: [str(value)],
    "Fraction": lambda value: [value.numerator, value.denominator],
    "date": lambda value: [value.isoformat()],
    "datetime": lambda value: [value.isoformat()],
    "time": lambda value: [value.isoformat()],
    "timedelta": lambda value: [value.days, value.seconds, value.microseconds],
    "deque": lambda value: [list(value), value.maxlen],
    "Counter": lambda value: [dict(value)],
}
_FILLED: dict[str, Callable[[], Any]] = {
    "list": list,
    "dict": dict,
    "set": set,
    "iterator": list,
}  # by `fill`, when they are made
_MODULES = {
    **{"Decimal": "decimal", "Fraction": "fractions", "deque": "collections", "Counter": "collections"},
    **dict.fromkeys(("date", "datetime", "time", "timedelta"), "datetime"),
}
_ITERATORS = {
    **dict.fromkeys(("generator", "map", "filter", "zip", "enumerate", "reversed", "list_iterator", "dict_values"), "iterator"),
    **dict.fromkeys(("chain", "islice", "permutations", "combinations", "product"), "iterator"),
    "dict_keys": "keys",
    "dict_items": "items",
}
_TEXTS: dict[str, Callable[[str], Any]] = {
    "int": lambda text: int(text, 16),
    "float": float.fromhex,
    "str": str,
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
}


class WireError(Exception):
    """The other process sent something that is not a value."""


class Remote:
    """Stands for an object that the other process keeps."""

    wire_number_: int  # a name that no test uses for an attribute of an object


def encode(value: Any, unknown: Unknown, classes: Set[str]) -> bytes:
    """Encode any object; `unknown` returns a number for an object that is not plain data.

    Objects of `classes`, given by name, and of their subclasses are also plain data, through their attributes.
    """
    return json.dumps(_Encoder(unknown, classes).run(value), separators=(",", ":")).encode()


def decode(data: bytes, known: Callable[[int], Any], remote: Callable[[int], Any], classes: Mapping[str, type]) -> Any:
    """Decode a value from bytes of the other process, which need not come from its `encode`.

    Args:
        data: The bytes.
        known: Number of an object of this process -> the object.
        remote: Number of an object of the other process -> its stand-in here.
        classes: Name -> class of objects that are plain data.

    Raises:
        WireError: If the bytes are not a value.
    """
    try:
        first, *entries = json.loads(data)
        decoder = _WireDecoder(entries, known, remote, classes)
        value = decoder.item(first)
        decoder.fill()
        return value
    except Exception as error:  # made-up data may lead to any exception
        raise WireError(f"{type(error).__name__}: {error}"[:200]) from None


class _Encoder:
    def __init__(self, unknown: Unknown, classes: Set[str]) -> None:
        self.unknown, self.classes = unknown, classes
        self.entries: list[Any] = []
        self.numbers: dict[int, int] = {}
        self.waiting: list[tuple[int, Any]] = []
        self.alive: list[Any] = []  # keeps objects alive, because an id is unique only as long as its object lives

    def item(self, value: Any) -> Any:
        kind = type(value)
        if value is None or kind is bool or kind is str or kind is float or (kind is int and -(2**63) < value < 2**63):
            return value
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.entries)
            self.alive.append(value)
            self.waiting.append((len(self.entries), value))
            self.entries.append(None)
        return [self.numbers[id(value)]]

    def run(self, value: Any) -> list[Any]:
        first = self.item(value)
        while self.waiting:
            number, value = self.waiting.pop()
            self.entries[number] = self.container(value)
        return [first, *self.entries]

    def container(self, value: Any) -> list[Any]:
        name = type(value).__name__
        if name in _BY_VALUE and type(value).__module__ in ("builtins", _MODULES.get(name), f"_{_MODULES.get(name)}"):
            return [name, *map(self.item, _BY_VALUE[name](value))]
        for kind, tag in ((list, "list"), (tuple, "tuple"), (set, "set"), (frozenset, "frozenset")):
            if isinstance(value, kind):
                return [tag, *map(self.item, value)]
        if isinstance(value, dict):
            return ["dict", *(self.item(part) for pair in value.items() for part in pair)]
        if isinstance(value, int):
            return ["int", hex(int(value))]
        if isinstance(value, float):
            return ["float", float(value).hex()]
        if isinstance(value, str):
            return ["str", str.__str__(value)]
        if isinstance(value, (bytes, bytearray)):
            return [type(value).__name__, bytes(value).hex()]
        return self.other(value)

    def other(self, value: Any) -> list[Any]:
        name = type(value).__name__
        if isinstance(value, Remote):
            return ["known", value.wire_number_]
        if isinstance(value, type) and _BUILTINS.get(value.__name__) is value:
            return ["type", value.__name__]
        if isinstance(value, range):
            return ["range", *map(self.item, (value.start, value.stop, value.step))]
        if name in _ITERATORS:  # iterators are read to their end
            return [_ITERATORS[name], *map(self.item, list(value))]
        if getattr(value, "shape", None) == () and hasattr(value, "item"):
            return self.container(value.item())  # a numpy scalar
        named = next((base.__name__ for base in type(value).__mro__ if base.__name__ in self.classes), None)
        if named:
            held = attributes(value)
            return ["object", named, *(part for key, value in held.items() for part in (key, self.item(value)))]
        return ["unknown", self.unknown(value), callable(value)]


class _WireDecoder:
    def __init__(
        self, entries: list[Any], known: Callable[[int], Any], remote: Callable[[int], Any], classes: Mapping[str, type]
    ):
        self.entries, self.known, self.remote, self.classes = entries, known, remote, classes
        self.values: dict[int, Any] = {}
        self.targets: dict[int, Any] = {}  # container number -> the list, dict or set to fill; for an iterator its list
        self.unfilled: list[int] = []

    def item(self, item: Any) -> Any:
        if not isinstance(item, list):
            return item
        (number,) = item
        if number not in self.values:
            self.values[number] = self.shell(number)
        return self.values[number]

    def shell(self, number: int) -> Any:
        """The container with this number: complete if it is immutable, else still empty until `fill` fills it."""
        if not 0 <= number < len(self.entries):
            raise WireError("no such container")
        tag, *items = self.entries[number]
        if tag == "object":
            self.unfilled.append(number)
            return object.__new__(self.classes[items[0]])
        if tag in _FILLED:
            self.unfilled.append(number)
            self.targets[number] = empty = _FILLED[tag]()
            return iter(empty) if tag == "iterator" else empty
        return self.whole(tag, items)

    def whole(self, tag: str, items: list[Any]) -> Any:
        if tag in _TEXTS:
            (text,) = items
            return _TEXTS[tag](text)
        if tag in ("tuple", "frozenset"):
            return (tuple if tag == "tuple" else frozenset)(map(self.item, items))
        if tag == "known":
            return self.known(items[0])
        if tag == "unknown":
            return self.remote(int(items[0]))
        if tag == "type":
            return _BUILTINS[items[0]]
        if tag == "range":
            return range(*map(self.item, items))
        arguments = list(map(self.item, items))
        if tag in ("keys", "items"):
            return dict.fromkeys(arguments).keys() if tag == "keys" else dict(arguments).items()
        if tag in _BY_VALUE:
            kind: Any = complex if tag == "complex" else getattr(__import__(_MODULES[tag]), tag)
            self.fill()  # a deque is made from a list, which must be complete
            return getattr(kind, "fromisoformat", kind)(*arguments)
        raise WireError(f"unknown tag {tag!r:.40}")

    def fill(self) -> None:
        while self.unfilled:
            number = self.unfilled.pop()
            value: Any = self.targets.get(number, self.values.get(number))
            tag, *items = self.entries[number]
            if tag in ("list", "iterator"):
                value.extend(map(self.item, items))
            elif tag == "set":
                value.update(map(self.item, items))
            elif tag == "dict":
                parts = map(self.item, items)
                value.update(zip(parts, parts, strict=True))
            else:
                for name, item in zip(items[1::2], items[2::2], strict=True):
                    if name.startswith("__"):
                        raise WireError(f"attribute {name!r:.40}")
                    if not is_computed(type(value), name):
                        object.__setattr__(value, name, self.item(item))  # works for frozen dataclasses as well


def own_classes(names: Mapping[str, Any], module: str, tested: Iterable[str]) -> dict[str, type]:
    """Classes that the set-up code has defined in a module with these names, except `tested` ones, which are the program's."""
    kinds = {name: value for name, value in names.items() if isinstance(value, type) and value.__module__ == module}
    return {name: kind for name, kind in kinds.items() if name not in tested}


def attributes(value: Any) -> dict[str, Any]:
    """Attributes of an object, including those in slots."""
    slots = [name for base in type(value).__mro__ for name in getattr(base, "__slots__", ()) if hasattr(value, name)]
    return {**{name: getattr(value, name) for name in slots if not name.startswith("__")}, **getattr(value, "__dict__", {})}


def is_computed(kind: type, name: str) -> bool:
    """Whether a class has a method or a computed attribute with this name, which data must not replace."""
    held = next((type(vars(base)[name]) for base in kind.__mro__ if name in vars(base)), None)
    return hasattr(held, "__get__") and not hasattr(held, "__set__")


def frames(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """Read messages, each after its length, until the other process closes its end and fewer bytes are read."""
    while len(head := read(4)) == 4:
        (length,) = struct.unpack(">I", head)
        if length > MAX_BYTES:
            raise WireError(f"a message of {length} bytes")
        body = read(length)
        if len(body) < length:
            return
        yield body


def send(descriptor: int, body: bytes) -> None:
    """Write a message with its length in front."""
    data = struct.pack(">I", len(body)) + body
    while data:
        data = data[os.write(descriptor, data) :]
