"""What tests in Python use, found by reading them: nothing of a data set runs in the training process.

The tests of a coding problem, read from the columns of its row.
"""

import ast
import builtins
import importlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

from hybrid_lightning.sandbox.programs import CallTests, StandardStreamTests

_NOT_IMPORTED = {"antigravity", "this"}  # they do something when imported
_RESULTS = "__results__"  # as in hybrid_lightning.sandbox.harness


def parse(code: str, what: str) -> ast.Module:
    """Parse Python.

    Raises:
        ValueError: If it is none; the message says what it was meant to be.
    """
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{what} is no Python code ({error})") from None


def defines_check(tests: ast.Module) -> bool:
    """Whether the tests are a function `check`, to be called with what is tested."""
    return any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tests.body)


@lru_cache(maxsize=256)
def defined_names(setup: str) -> frozenset[str]:
    """Names that code defines, with those of `from module import *` of the standard library."""
    tree = parse(setup, "the set-up code")
    names = _bound(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            module = node.module or ""
            if module.split(".")[0] in sys.stdlib_module_names and module not in _NOT_IMPORTED:
                loaded = importlib.import_module(module)
                names |= set(getattr(loaded, "__all__", [name for name in vars(loaded) if name[0] != "_"]))
    return frozenset(names)


def used_names(tests: ast.Module, defined: frozenset[str]) -> tuple[set[str], list[str]]:
    """Names of the program that tests use, and imports of the standard library that they lack.

    A name that is a module of the standard library or a function of `math` is taken from there and never from the program, which
    could otherwise bring an `isclose` of its own.

    Args:
        tests: The tests.
        defined: Names that the set-up code defines.

    Returns:
        The names, and lines of code.
    """
    loaded = {node.id for node in ast.walk(tests) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    free = loaded - _bound(tests) - defined - set(dir(builtins))
    modules = {name for name in free if name in sys.stdlib_module_names and name not in _NOT_IMPORTED}
    functions = {name for name in free - modules if hasattr(math, name)}
    imports = [f"import {name}" for name in sorted(modules)] + [f"from math import {name}" for name in sorted(functions)]
    return free - modules - functions, imports


def tested_builtins(tests: list[ast.Module]) -> set[str]:
    """Built-in functions that every test calls: what is tested may be named like one."""
    called = [
        {node.func.id for node in ast.walk(test) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        for test in tests
    ]
    return set.intersection(*called) & set(dir(builtins)) if called else set()


def expression_names(expression: str) -> set[str]:
    """Names in an expression such as `Solution().twoSum`.

    Raises:
        ValueError: If it is none.
    """
    try:
        tree = ast.parse(expression, mode="eval")
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"is no expression of Python ({error})") from None
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def count_asserts(tests: ast.Module) -> str:
    """The code of tests in which each `assert` of the function `check` notes whether it held, instead of ending the tests."""

    class Rewriter(ast.NodeTransformer):
        def visit_Assert(self, node: ast.Assert) -> ast.AST:
            note = f"try:\n pass\nexcept Exception:\n {_RESULTS}.append(False)\nelse:\n {_RESULTS}.append(True)"
            (attempt,) = ast.parse(note).body
            assert isinstance(attempt, ast.Try)
            attempt.body = [node]
            return attempt

    body = [Rewriter().visit(node) if isinstance(node, ast.FunctionDef) and node.name == "check" else node for node in tests.body]
    return ast.unparse(ast.fix_missing_locations(ast.Module(body, [])))


def _bound(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names


def read_problem(
    columns: Mapping[str, Any],
    test_column: str,
    entry_point_column: str | None,
    setup_column: str | None,
    count_all: bool,
) -> CallTests | StandardStreamTests:
    """Make tests of a row.

    Args:
        columns: The row.
        test_column: Column with the tests, in one of the forms that `CodeTests` names.
        entry_point_column: Column with the expression that is tested; only needed for a function `check`.
        setup_column: Column with code that comes before the program and the tests; may be missing.
        count_all: Whether each `assert` in a function `check` is a test of its own.

    Raises:
        ValueError: If there are no tests in it; the message names the column and what is wrong.
    """
    try:
        tests = _plain(columns.get(test_column))
    except ValueError as error:
        raise ValueError(f"column {test_column!r} {error}") from None
    setup = _setup(columns, setup_column)
    pairs = _pairs(test_column, tests)
    if pairs is not None:
        return StandardStreamTests(pairs, setup)
    codes = [tests] if isinstance(tests, str) else tests
    trees = [parse(code, f"column {test_column!r}") for code in codes]
    entry_point = _entry_point(columns, entry_point_column)
    if any(map(defines_check, trees)):
        if entry_point is None:
            raise ValueError(
                f"column {test_column!r} defines check(...), so entry_point_column must name a column with what it is called "
                f"with, such as Solution().twoSum; {entry_point_column!r} has nothing"
            )
        whole = parse("\n".join(codes), f"column {test_column!r}")
        names, imports = used_names(whole, defined_names(setup) - expression_names(entry_point))
        code = count_asserts(whole) if count_all else "\n".join(codes)
        return CallTests((code,), setup, "\n".join(imports), tuple(sorted(names & expression_names(entry_point))), entry_point)
    return _asserts(test_column, trees, setup, expression_names(entry_point) if entry_point else set())


def _asserts(column: str, trees: list[ast.Module], setup: str, entry_names: set[str]) -> CallTests:
    statements = [node for tree in trees for node in tree.body if not _imports_solution(node)]
    if not any(isinstance(node, ast.Assert) for statement in statements for node in ast.walk(statement)):
        raise ValueError(f"column {column!r} has no assert: give code such as assert f(1) == 2, or a function check(candidate)")
    whole = ast.Module(statements, [])
    names, imports = used_names(whole, defined_names(setup) - entry_names)
    names |= entry_names & {node.id for node in ast.walk(whole) if isinstance(node, ast.Name)}
    tests = [ast.Module([node], []) for node in statements]
    if not names:
        names = tested_builtins([test for test in tests if isinstance(test.body[0], ast.Assert)])
        names = names if len(names) == 1 else set()
    if not names:
        raise ValueError(f"column {column!r} calls nothing that the program could define; name it by entry_point_column")
    # What is no assert prepares the next one.
    codes, before = [], ""
    for test in tests:
        (statement,) = test.body
        before += ast.unparse(test) + "\n"
        is_test = isinstance(statement, ast.Assert)
        if isinstance(statement, ast.FunctionDef) and statement.name.startswith("test") and not statement.args.args:
            before += f"{statement.name}()\n"  # as pytest would call it
            is_test = True
        if is_test or test is tests[-1]:
            codes.append(before)
            before = ""
    return CallTests(tuple(codes), setup, "\n".join(imports), tuple(sorted(names)))


def _imports_solution(node: ast.stmt) -> bool:
    """Whether it is the import by which tests for pytest name the program, as in `from solution import add`."""
    return isinstance(node, ast.ImportFrom) and node.module == "solution"


def _plain(tests: Any) -> Any:
    """Tests as a text of code, a list of such texts, or pairs; JSON in a text is read."""
    if isinstance(tests, str) and tests.lstrip()[:1] in ("{", "["):
        with suppress(json.JSONDecodeError):  # code may begin like this
            tests = json.loads(tests)
    if isinstance(tests, str) and tests.strip():
        return tests
    if isinstance(tests, Mapping) and tests:
        return tests
    if isinstance(tests, Sequence) and not isinstance(tests, str) and tests:
        texts = all(isinstance(test, str) and test.strip() for test in tests)
        if texts or all(isinstance(test, Mapping) for test in tests):
            return list(tests)
    if tests is None or not tests or isinstance(tests, str):
        raise ValueError("is missing or empty")
    raise ValueError(f"is neither code, nor a list of asserts, nor inputs and outputs, but a {type(tests).__name__}")


def _pairs(column: str, tests: Any) -> tuple[tuple[str, str], ...] | None:
    """Standard streams, of `{"inputs": [...], "outputs": [...]}` or `[{"input": ..., "output": ...}, ...]`; None for code."""
    if isinstance(tests, Mapping):
        if tests.get("fn_name"):
            raise ValueError(
                f"column {column!r} has inputs of a function (fn_name), not of standard input; write them as asserts"
            )
        inputs, outputs = tests.get("inputs"), tests.get("outputs")
        if not isinstance(inputs, Sequence) or not isinstance(outputs, Sequence) or not inputs or len(inputs) != len(outputs):
            raise ValueError(f'column {column!r} must have as many "inputs" as "outputs", at least one')
    elif isinstance(tests, list) and isinstance(tests[0], Mapping):
        if not all("input" in test and "output" in test for test in tests):
            raise ValueError(f'each test in column {column!r} must have an "input" and an "output"')
        inputs, outputs = [test["input"] for test in tests], [test["output"] for test in tests]
    else:
        return None
    if not all(isinstance(text, str) for text in (*inputs, *outputs)):
        raise ValueError(f"the inputs and outputs in column {column!r} must be text, as they stand in the standard streams")
    return tuple(zip(inputs, outputs, strict=True))


def _setup(columns: Mapping[str, Any], column: str | None) -> str:
    code = None if column is None else columns.get(column)
    if code is None:
        return ""
    if isinstance(code, Sequence) and not isinstance(code, str) and all(isinstance(line, str) for line in code):
        code = "\n".join(code)
    if not isinstance(code, str):
        raise ValueError(f"column {column!r} holds a {type(code).__name__}, not code")
    try:
        parse(code, f"column {column!r}")
    except ValueError as error:
        raise ValueError(f"{error}; set setup_column to the column with imports and helpers, or to null") from None
    return code


def _entry_point(columns: Mapping[str, Any], column: str | None) -> str | None:
    value = None if column is None else columns.get(column)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} holds a {type(value).__name__}, not an expression")
    try:
        expression_names(value)
    except ValueError as error:
        raise ValueError(f"column {column!r}: {value!r} {error}") from None
    return value.strip()
