"""Server in the untrusted program's box: answers requests from the tests' process with plain data, or runs a whole program.

Nothing in this process is trusted once the program runs. The program may change everything here, but can only send other data.
"""

import ast
import io
import os
import random
import sys
import time
import traceback
import types
from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from typing import Any

from hybrid_lightning.sandbox import wire

RECURSION_LIMIT = 100_000  # judges of programming contests raise it as well
MAIN, MODULE, CELL = "__main__", "solution", "<cell>"
WHOLE = b"whole"  # written to the error output, before the CPU time in ms, after all cells; missing if a cell ends the process


def compile_program(setup: str, source: str) -> list[types.CodeType]:
    """Compile the set-up code and the program, and return the parts in the order in which they run.

    The program may be just the body of the last function of the set-up code, as for HumanEval.

    Raises:
        SyntaxError: If it is not Python.
    """
    before = compile(setup, "<setup>", "exec", dont_inherit=True)
    try:
        return [before, compile(source, "<solution>", "exec", dont_inherit=True)]
    except SyntaxError as error:
        try:
            return [compile(f"{setup}\n{source}", "<solution>", "exec", dont_inherit=True)]
        except SyntaxError:
            raise error from None


class CandidateServer:
    """Evaluates names, calls functions and reads attributes for the tests."""

    def __init__(self, tested: Sequence[str], requests: int, replies: int) -> None:
        self.tested, self.requests, self.replies = tested, requests, replies
        self.kept: list[Any] = []
        self.numbers: dict[int, int] = {}
        self.classes: Set[str] = frozenset()
        self.module = types.ModuleType(MODULE)
        sys.modules[MODULE] = self.module

    def load(self, setup: str, source: str) -> None:
        """Run the program's top level."""
        *before, program = compile_program(setup, source)
        names = self.module.__dict__
        for code in before:
            exec(code, names)
        self.classes = wire.own_classes(names, MODULE, self.tested).keys()
        exec(program, names)

    def keep(self, value: Any) -> int:
        """Keep an object that is not plain data, and return a number for the tests to refer to it."""
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.kept)
            self.kept.append(value)
        return self.numbers[id(value)]

    def serve(self, first: Callable[[], None]) -> None:
        """Load the program with `first`, reply whether that worked, and answer requests until there are no more."""
        wire.send(self.replies, self.attempt(first))
        with open(self.requests, "rb", closefd=False) as stream:
            for body in wire.frames(stream.read):
                wire.send(self.replies, self.attempt(lambda body=body: self.answer(body)))  # type: ignore[misc]

    def attempt(self, action: Callable[[], Any]) -> bytes:
        """Perform an action and encode the reply: its result, or its exception."""
        try:
            return wire.encode(["ok", action()], self.keep, self.classes)
        except BaseException as error:
            kind = next(base for base in type(error).__mro__ if base.__module__ == "builtins")  # tests know no other exceptions
            return wire.encode(["error", kind.__name__, str(error)[:500]], self.keep, self.classes)

    def answer(self, body: bytes) -> Any:
        """Carry out a request. If a function returns None, its arguments are sent back, since it may have changed them."""
        known = self.module.__dict__
        operation, *operands = wire.decode(body, self.kept.__getitem__, self.kept.__getitem__, known)
        if operation == "evaluate":
            return [eval(operands[0], known), None]
        if operation == "get":
            return [getattr(*operands), None]
        if operation == "set":
            return [setattr(*operands), None]  # type: ignore[func-returns-value]
        function, arguments, keywords = operands
        result = function(*arguments, **keywords)
        return [result, [arguments, keywords] if result is None else None]


def run_function(setup: str, source: str, tested: Sequence[str], requests: int, replies: int) -> None:
    """Serve the functions of a program over two pipes, including the names `tested` (see `CandidateServer`)."""
    sys.setrecursionlimit(RECURSION_LIMIT)
    server = CandidateServer(tested, requests, replies)
    server.serve(lambda: server.load(setup, source))
    os._exit(0)


def run_script(setup: str, source: str) -> None:
    """Run a program as Python runs a script, with standard input and output."""
    sys.setrecursionlimit(RECURSION_LIMIT)
    module = types.ModuleType(MAIN)
    sys.modules[MAIN] = module
    for code in compile_program(setup, source):
        exec(code, module.__dict__)


def run_cells(cells: Sequence[str], seed: int) -> None:
    """Run pieces of code one after another, show only the output of the last one, and end with a mark (see `WHOLE`).

    Cells share their names and the seed of `random`, so the earlier cells of a session have the same effect when they run again.
    The output of a cell is what it prints, then the value of its last statement (if an expression) or one line about its error.
    Later cells run even after an error.
    """
    random.seed(seed)
    module = types.ModuleType(MAIN)
    sys.modules[MAIN] = module
    for cell in cells:
        _begin_output(keep=False)
        try:
            _run_cell(cell, module.__dict__)
        except BaseException as error:
            print(_short(error))
    _begin_output(keep=True)  # tests that another cell could run; if not, this process ends with an error
    os.write(2, b"%s %d" % (WHOLE, time.process_time() * 1000))
    os._exit(0)  # without waiting for threads that a cell has left


def _begin_output(keep: bool) -> None:
    """Make a fresh stream for standard output that appends to (`keep`) or replaces the existing content."""
    with suppress(Exception):  # the output is too long, or a cell has closed or removed the stream
        sys.stdout.flush()
    size = os.fstat(1).st_size if keep else 0
    os.ftruncate(1, size)
    os.lseek(1, size, os.SEEK_SET)
    binary = open(1, "wb", closefd=False)  # noqa: SIM115  (open as long as the cell runs)
    sys.stdout = sys.stderr = io.TextIOWrapper(binary, encoding="utf-8", errors="backslashreplace")


def _run_cell(cell: str, names: dict[str, Any]) -> None:
    tree = ast.parse(cell, CELL)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, CELL, "exec", dont_inherit=True), names)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), CELL, "eval", dont_inherit=True), names)
        if value is not None:
            print(repr(value))


def _short(error: BaseException) -> str:
    """An error in one line, with the line of the cell that raised it."""
    text = traceback.format_exception_only(error)[-1].strip()
    lines = [number for frame, number in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == CELL]
    number = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    return text if number is None else f"{text} (line {number})"
