"""Values between the processes: they arrive equal and of built-in types; anything else is refused."""

import collections
import dataclasses
import datetime
import decimal
import fractions
import functools
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_lightning.sandbox import wire

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
SCALARS |= st.complex_numbers(allow_nan=False)


def tuples(parts):
    return st.lists(parts, max_size=3).map(tuple)


HASHABLE = st.recursive(SCALARS, lambda parts: tuples(parts) | st.frozensets(parts, max_size=3), max_leaves=5)
VALUES = st.recursive(
    HASHABLE | st.sets(HASHABLE, max_size=3),
    lambda parts: st.lists(parts, max_size=4) | st.dictionaries(HASHABLE, parts, max_size=4) | tuples(parts),
    max_leaves=12,
)


def there(value, classes=None):
    """A value as the other side gets it."""
    classes = classes or {}
    data = wire.encode(value, lambda unknown: 7, frozenset(classes))
    return wire.decode(data, "known {}".format, "remote {}".format, classes)


def exactly(value):
    """A value with the types of all its parts, to be compared."""
    if isinstance(value, (list, tuple)):
        return type(value), *map(exactly, value)
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(map(exactly, value))
    if isinstance(value, dict):
        return dict, *((exactly(key), exactly(held)) for key, held in value.items())
    return type(value), repr(value)


@settings(max_examples=100, deadline=None)
@given(VALUES)
def test_plain_data_arrives_as_it_is(value):
    assert there(value) == value and exactly(there(value)) == exactly(value)


def test_so_does_this():
    for value in (
        *(10**5000, -(2**70), float("inf"), range(3, 9, 2), decimal.Decimal("1.50"), fractions.Fraction(1, 3), "\ud800", int),
        *(datetime.date(2024, 2, 29), datetime.time(7, 30), datetime.timedelta(days=1, microseconds=5)),
        datetime.datetime(2024, 2, 29, 23, 59, 1, 5, datetime.timezone(datetime.timedelta(hours=-2))),
        *(collections.deque([1, [2]], maxlen=5), collections.Counter("aab"), bytearray(b"x"), {1: 2}.keys(), {1: 2}.items()),
    ):
        arrived = there(value)
        assert arrived == value and type(arrived) is type(value)


class Always(int):
    def __eq__(self, other):
        return True

    __hash__ = int.__hash__


def test_subclasses_arrive_as_what_they_extend_and_iterators_with_what_they_give():
    assert type(there(Always(3))) is int and there(Always(3)) != 4
    assert type(there(collections.namedtuple("point", "x y")(1, 2))) is tuple
    ordered = there(collections.OrderedDict(a=2, b=1))
    assert type(ordered) is dict and ordered == {"a": 2, "b": 1}
    assert list(there(x * x for x in range(4))) == [0, 1, 4, 9]
    assert list(there(iter([[1], [2]]))) == [[1], [2]] and list(there({1: 2}.values())) == [2]


def test_what_is_shared_or_circular_or_deep_stays_so():
    row = [0]
    grid = there([row, row])
    grid[0][0] = 1
    assert grid == [[1], [1]]
    loop: list = []
    loop.append(loop)
    assert (arrived := there(loop))[0] is arrived
    deep: list = []
    for _ in range(10_000):
        deep = [deep]
    arrived, depth = there(deep), 0
    while arrived:
        arrived, depth = arrived[0], depth + 1
    assert depth == 10_000


class Node:
    def __init__(self, value, following=None):
        self.value, self.following = value, following


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    value: object


def test_objects_of_named_classes_arrive_by_their_attributes():
    first = Node(1, Node(2))
    first.following.following = first
    arrived = there(first, {"Node": Node})
    assert type(arrived) is Node and arrived.following.value == 2 and arrived.following.following is arrived
    assert there(Frozen([3]), {"Frozen": Frozen}) == Frozen([3])
    assert there(first) == "remote 7"


class Judge(Node):
    def equals(self, other):
        return self.value == other.value

    @functools.cached_property
    def twice(self):
        return 2 * self.value


def test_no_data_replaces_what_a_class_computes_and_a_subclass_is_the_class():
    liar = Judge(1)
    vars(liar).update(equals=bool, twice=6)
    arrived = there(liar, {"Judge": Judge})
    assert not arrived.equals(Judge(3)) and arrived.twice == 2
    assert type(arrived := there(Judge(3), {"Node": Node})) is Node and arrived.value == 3


def test_whatever_is_not_a_value_is_refused():
    for message in (
        *(b"", b"{", b"[]", b"[[5],[]]", b'[[-1],["list"]]', b"[[0],[]]", b"[[0],17]", b"[" * 100_000),
        *([[0], ["no such tag"]], [[0], ["tuple", [0]]], [[0], ["dict", 1]], [[0], ["dict", [1], 1], ["list"]]),
        *([[0], ["set", [1]], ["list"]], [[0], ["int", "1z"]], [[0], ["type", "eval"]], [[0], ["object", "Other"]]),
        *([[0], ["object", "Node", "value"]], [[0], ["object", "Node", "__eq__", 1]]),
        [[0], ["object", "Node", "__class__", [1]], ["type", "object"]],
    ):
        data = message if isinstance(message, bytes) else json.dumps(message).encode()
        with pytest.raises(wire.WireError):
            wire.decode(data, str, str, {"Node": Node})


def test_frames_end_with_the_pipe_and_are_bounded():
    data = b"\0\0\0\3one" + b"\0\0\0\0" + b"\0\0\0\5half"
    assert list(wire.frames(io.BytesIO(data).read)) == [b"one", b""]
    with pytest.raises(wire.WireError, match="4294967295 bytes"):
        list(wire.frames(io.BytesIO(b"\xff" * 4).read))
