"""Runs the tests in their box, in an interpreter that the program never enters.

The tests use the program's functions and objects through proxies, which send requests to the program's process and get plain data
back. The verdict goes into a file that only this process has open. So nothing that the program prints, patches, compares or
inspects can change the verdict, and neither can its exit code. The program knows neither the tests nor the expected results, and
its answers are rebuilt here from built-in types and the classes of the set-up code.
"""

import builtins
import re
import sys
import types
from collections.abc import MutableMapping, MutableSequence, MutableSet
from typing import Any

from hybrid_lightning.sandbox import wire
from hybrid_lightning.sandbox.candidate import RECURSION_LIMIT

MODULE = "tests"
RESULTS = "__results__"  # in the tests' namespace: a bool for each test, if they are counted
# Exceptions of the program that are not raised here: they would end the tests' loops early, or look like failed asserts.
_NEVER_RAISED = (StopIteration, StopAsyncIteration, AssertionError)
# Methods that tests may not call on an object that a function returned: such tests expect data, but the methods would be the
# program's own. The methods of containers are allowed, since a program may define a container.
_OF_CONTAINERS = {name for kind in (MutableSequence, MutableMapping, MutableSet) for name in vars(kind)}
_OF_CONTAINERS |= {"copy", "get", "items", "keys", "sort", "values"}
_OF_DATA = {name for kind in (str, bytes, int, float, list, dict, set) for name in dir(kind)} - _OF_CONTAINERS
_EQUALITY = re.compile(r"equal|equiv|same|identical|matches|compare|cmp|is_?close|all_?close|\Aeq\Z", re.IGNORECASE)


def run_tests(job: dict[str, Any], requests: int, replies: int) -> dict[str, Any]:
    """Run tests against the program at the other end of two pipes.

    Args:
        job: `setup` (code before the tests), `tests` (a list of pieces of code, each a test), `names` (names of the program that
            the tests use), `entry_point` (expression that is passed to `check`; None if the tests define no such function),
            `tested` (all names in these two), `all` (whether to continue after a test fails).
        requests: File descriptor to write requests to.
        replies: File descriptor to read replies from.

    Returns:
        `passed` and `total` (numbers of tests), `reason` (why not all passed), and `unusable` (whether the set-up code fails).
    """
    sys.setrecursionlimit(RECURSION_LIMIT)
    peer = Peer(requests, replies)
    module = types.ModuleType(MODULE)
    names = module.__dict__
    try:
        exec(compile(job["setup"], "<setup>", "exec", dont_inherit=True), names)
    except BaseException as error:
        return {"passed": 0, "total": 1, "reason": f"the set-up code of the tests fails: {_describe(error)}", "unusable": True}
    peer.classes = wire.own_classes(names, MODULE, job["tested"])
    results: list[bool] = []
    names[RESULTS] = results
    reason = ""
    try:
        peer.reply()  # whether the program could be loaded
        for name in job["names"]:
            names[name] = peer.named(name)
        if job["entry_point"] is not None:
            candidate = peer.named(job["entry_point"])
    except BaseException as error:
        return {"passed": 0, "total": max(1, len(job["tests"])), "reason": _describe(error)}
    for code in job["tests"]:
        before = len(results)
        try:
            exec(compile(code, "<tests>", "exec", dont_inherit=True), names)
            if job["entry_point"] is not None:
                names["check"](candidate)
            if len(results) == before:
                results.append(True)
        except BaseException as error:
            results.append(False)
            reason = reason or _describe(error)
        if not job["all"] and not all(results):
            break
    if not peer.calls or peer.broken:  # tests that never called the program prove nothing
        return {"passed": 0, "total": max(1, len(results)), "reason": peer.broken or "the tests never called the program"}
    return {"passed": sum(results), "total": len(results), "reason": reason or ("" if all(results) else "a test failed")}


class Proxy(wire.Remote):
    """Stands for an object of the program, by its number there; it can be called, and its attributes can be read.

    Operators are not forwarded: an object that claims to be equal to everything is equal only to itself here. `of_class` marks a
    class that the tests name, such as Bank, or an object that comes from such a class; its methods are then under test.
    """

    def __init__(self, peer: "Peer", number: int, of_class: bool) -> None:
        self.__dict__.update(wire_number_=number, wire_peer_=peer, wire_of_class_=of_class)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Call it in the program's process."""
        return self.wire_peer_.call(self, arguments, keywords)

    def __getattr__(self, name: str) -> Any:
        """Read an attribute in the program's process."""
        if name.startswith("__"):
            raise AttributeError(name)
        value = self.__dict__["wire_peer_"].ask("get", self, name)[0]
        if isinstance(value, Proxy) and not self.wire_of_class_ and (name in _OF_DATA or _EQUALITY.search(name)):
            raise TypeError(f"the program returned an object with its own {name}() where the tests expect data")
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute in the program's process."""
        self.wire_peer_.ask("set", self, name, value)


class Peer:
    """Handle of the program's process."""

    def __init__(self, requests: int, replies: int) -> None:
        self.requests = requests
        self.frames = wire.frames(open(replies, "rb", closefd=False).read)  # noqa: SIM115  (open as long as this process)
        self.classes: dict[str, type] = {}
        self.proxies: dict[int, Proxy] = {}
        self.of_class = False  # whether the next answer is, or comes from, a class that the tests name
        self.calls = 0
        self.broken = ""  # why the program can no longer take requests; kept because tests may catch the exception

    def proxy(self, number: int) -> Proxy:
        """The proxy of an object of the program; always the same proxy for the same object."""
        return self.proxies.setdefault(number, Proxy(self, number, self.of_class))

    def reply(self) -> Any:
        """Read the next answer.

        Raises:
            RuntimeError: If the answer is missing, or is not a value.
            Exception: The program's exception, if its class is built in.
        """
        try:
            body = next(self.frames, None)
            if body is None:
                raise wire.WireError("it ended before it answered")
            status, *content = wire.decode(body, _nothing, self.proxy, self.classes)
            if status == "error":
                name, message = (str(part)[:500] for part in content)
            elif status == "ok" and len(content) == 1:
                return content[0]
            else:
                raise wire.WireError("it answered with something else")
        except (wire.WireError, ValueError, MemoryError) as error:
            self.broken = f"the program cannot be asked: {error}"
            raise RuntimeError(self.broken) from None
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, _NEVER_RAISED):
            try:
                raised: Exception = kind(message)
            except TypeError:  # the constructors of UnicodeDecodeError and the like need more arguments
                raised = RuntimeError(f"{name}: {message}")
            raise raised
        raise RuntimeError(f"{name}: {message}")

    def ask(self, operation: str, subject: Any, *operands: Any) -> Any:
        """Send a request about an object or an expression, and wait for the answer."""
        if self.broken:
            raise RuntimeError(self.broken)
        self.of_class = subject.wire_of_class_ if isinstance(subject, Proxy) else _names_class(subject)
        try:
            wire.send(self.requests, wire.encode([operation, subject, *operands], _refuse, frozenset(self.classes)))
        except BrokenPipeError:
            self.broken = "the program has ended"
            raise RuntimeError(self.broken) from None
        answer = self.reply()
        if not isinstance(answer, list) or len(answer) != 2:
            self.broken = "the program cannot be asked: it answered with something else"
            raise RuntimeError(self.broken)
        return answer

    def named(self, expression: str) -> Any:
        """The value of an expression in the program. A built-in class is called in this process; its calls count as well."""
        value = self.ask("evaluate", expression)[0]
        if not isinstance(value, type):
            return value

        def called(*arguments: Any, **keywords: Any) -> Any:
            self.calls += 1
            return value(*arguments, **keywords)

        return called

    def call(self, function: Proxy, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Call a function of the program; if it returns None, its changes to the arguments are copied to the arguments here."""
        self.calls += 1
        result, changed = self.ask("call", function, list(arguments), keywords)
        if result is None and isinstance(changed, list) and len(changed) == 2:
            pairs = [*zip(arguments, changed[0], strict=False), *((keywords[key], changed[1].get(key)) for key in keywords)]
            for old, new in pairs:
                if type(old) is type(new):
                    _overwrite(old, new)
        return result


def _overwrite(old: Any, new: Any) -> None:
    """Give a mutable argument the content that the program's function left in its copy."""
    if isinstance(old, list):
        old[:] = new
    elif isinstance(old, (dict, set)):
        old.clear()
        old.update(new)
    elif type(old).__module__ == MODULE:
        for name, value in wire.attributes(new).items():
            setattr(old, name, value)


def _names_class(expression: str) -> bool:
    """Whether an expression such as Bank names a class, by its capital letter; Solution is LeetCode's class around a function."""
    return expression[:1].isupper() and not re.match(r"Solution\b", expression)


def _nothing(number: int) -> Any:
    raise wire.WireError("this process keeps no objects for the program")


def _refuse(value: Any) -> int:
    raise TypeError(f"a {type(value).__name__} cannot be handed to the program: only plain data can")


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]
