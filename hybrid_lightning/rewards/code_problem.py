"""Read the tests of a coding problem from the columns of its row (see `CodeTests` for their forms).

The code of the tests is only parsed, to find its calls of the program: no code from a data set runs in the training process.
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

_NOT_IMPORTED = {"antigravity", "this"}  # importing these has an effect
_RESULTS = "__results__"  # as in hybrid_lightning.sandbox.harness


def read_problem(
    columns: Mapping[str, Any], test_column: str, entry_point_column: str | None, setup_column: str | None, count_all: bool
) -> CallTests | StandardStreamTests:
    """Read the tests of a row; for the columns see `CodeTests`.

    With `count_all` each `assert` in a function `check` is a separate test.

    Raises:
        ValueError: If the row has no tests that can be run; the message names the column and the mistake.
    """
    tests = columns.get(test_column)
    if isinstance(tests, str) and tests.lstrip()[:1] in ("{", "["):
        with suppress(json.JSONDecodeError):  # code may also begin with a bracket
            tests = json.loads(tests)
    setup = _setup_code(columns, setup_column)
    pairs = _stream_pairs(test_column, tests)
    if pairs is not None:
        return StandardStreamTests(pairs, setup)
    codes = _codes(test_column, tests)
    trees = [_parse_python(code, f"column {test_column!r}") for code in codes]
    entry_point = _entry_point(columns, entry_point_column)
    if any(isinstance(node, ast.FunctionDef) and node.name == "check" for tree in trees for node in tree.body):
        if entry_point is None:
            raise ValueError(
                f"column {test_column!r} defines check(...), so entry_point_column must name a column with the argument of "
                f"check, such as Solution().twoSum; column {entry_point_column!r} is empty"
            )
        whole = _parse_python("\n".join(codes), f"column {test_column!r}")
        names, imports = _used_names(whole, _defined_names(setup) - _expression_names(entry_point))
        code = _count_asserts(whole) if count_all else "\n".join(codes)
        return CallTests((code,), setup, "\n".join(imports), tuple(sorted(names & _expression_names(entry_point))), entry_point)
    return _assert_tests(test_column, trees, setup, _expression_names(entry_point) if entry_point else set())


def _assert_tests(column: str, trees: list[ast.Module], setup: str, entry_names: set[str]) -> CallTests:
    """Tests of code with asserts: each assert, or each function `test_...()`, is one test."""
    # Tests for pytest import from the program: `from solution import add`.
    statements = [
        node for tree in trees for node in tree.body if not (isinstance(node, ast.ImportFrom) and node.module == "solution")
    ]
    if not any(isinstance(node, ast.Assert) for statement in statements for node in ast.walk(statement)):
        raise ValueError(f"column {column!r} has no assert; give code such as assert f(1) == 2, or a function check(candidate)")
    whole = ast.Module(statements, [])
    names, imports = _used_names(whole, _defined_names(setup) - entry_names)
    names |= entry_names & {node.id for node in ast.walk(whole) if isinstance(node, ast.Name)}
    tests = [ast.Module([node], []) for node in statements]
    if not names:
        names = _tested_builtins([test for test in tests if isinstance(test.body[0], ast.Assert)])
        names = names if len(names) == 1 else set()
    if not names:
        raise ValueError(f"column {column!r} calls nothing that the program could define; name it by entry_point_column")
    # Statements that are not tests are preparation for the next test.
    codes, before = [], ""
    for test in tests:
        (statement,) = test.body
        before += ast.unparse(test) + "\n"
        is_test = isinstance(statement, ast.Assert)
        if isinstance(statement, ast.FunctionDef) and statement.name.startswith("test") and not statement.args.args:
            before += f"{statement.name}()\n"  # as pytest does
            is_test = True
        if is_test or test is tests[-1]:
            codes.append(before)
            before = ""
    return CallTests(tuple(codes), setup, "\n".join(imports), tuple(sorted(names)))


def _codes(column: str, tests: Any) -> list[str]:
    """The pieces of code in a test column."""
    codes = [tests] if isinstance(tests, str) else tests or []
    if not isinstance(codes, Sequence) or not all(isinstance(code, str) and code.strip() for code in codes) or not codes:
        raise ValueError(f"column {column!r} has neither code, nor a list of asserts, nor inputs and outputs")
    return list(codes)


def _stream_pairs(column: str, tests: Any) -> tuple[tuple[str, str], ...] | None:
    """Pairs of standard input and output, from `{"inputs": [...], "outputs": [...]}` or `[{"input": ..., "output": ...}, ...]`.

    Returns None if the column has code.
    """
    if isinstance(tests, Mapping) and tests:
        if tests.get("fn_name"):
            raise ValueError(
                f"column {column!r} has inputs of a function (fn_name), not of standard input; write them as asserts"
            )
        inputs, outputs = tests.get("inputs") or (), tests.get("outputs") or ()
        if not inputs or len(inputs) != len(outputs):
            raise ValueError(f'column {column!r} must have the same number of "inputs" and "outputs", at least one')
    elif isinstance(tests, Sequence) and tests and all(isinstance(test, Mapping) for test in tests):
        if not all("input" in test and "output" in test for test in tests):
            raise ValueError(f'each test in column {column!r} must have an "input" and an "output"')
        inputs, outputs = [test["input"] for test in tests], [test["output"] for test in tests]
    else:
        return None
    if not all(isinstance(text, str) for text in (*inputs, *outputs)):
        raise ValueError(f"the inputs and outputs in column {column!r} must be text, exactly as in the standard streams")
    return tuple(zip(inputs, outputs, strict=True))


def _setup_code(columns: Mapping[str, Any], column: str | None) -> str:
    code = None if column is None else columns.get(column)
    if code is None:
        return ""
    code = code if isinstance(code, str) else "\n".join(code)
    try:
        _parse_python(code, f"column {column!r}")
    except ValueError as error:
        raise ValueError(f"{error}; set setup_column to the column with imports and helpers, or to null") from None
    return code


def _entry_point(columns: Mapping[str, Any], column: str | None) -> str | None:
    value = None if column is None else columns.get(column)
    if value is None or value == "":
        return None
    try:
        _expression_names(value)
    except ValueError as error:
        raise ValueError(f"column {column!r}: {value!r} {error}") from None
    return str(value).strip()


def _parse_python(code: str, what: str) -> ast.Module:
    """Parse Python code; a ValueError begins with `what`."""
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{what} is not Python code ({error})") from None


def _count_asserts(tests: ast.Module) -> str:
    """Rewrite tests so that each `assert` in the function `check` records whether it held, instead of ending the tests."""

    class Rewriter(ast.NodeTransformer):
        def visit_Assert(self, node: ast.Assert) -> ast.AST:
            note = f"try:\n pass\nexcept Exception:\n {_RESULTS}.append(False)\nelse:\n {_RESULTS}.append(True)"
            (attempt,) = ast.parse(note).body
            assert isinstance(attempt, ast.Try)
            attempt.body = [node]
            return attempt

    body = [Rewriter().visit(node) if isinstance(node, ast.FunctionDef) and node.name == "check" else node for node in tests.body]
    return ast.unparse(ast.fix_missing_locations(ast.Module(body, [])))


def _expression_names(expression: str) -> set[str]:
    """Names in an expression such as `Solution().twoSum`; ValueError if it is not an expression."""
    try:
        tree = ast.parse(expression, mode="eval")
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"is not a Python expression ({error})") from None
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


@lru_cache(maxsize=256)
def _defined_names(setup: str) -> frozenset[str]:
    """Names that set-up code defines, including `from module import *` for modules of the standard library."""
    tree = _parse_python(setup, "the set-up code")
    names = _bound_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            module = node.module or ""
            if module.split(".")[0] in sys.stdlib_module_names and module not in _NOT_IMPORTED:
                loaded = importlib.import_module(module)
                names |= set(getattr(loaded, "__all__", [name for name in vars(loaded) if name[0] != "_"]))
    return frozenset(names)


def _used_names(tests: ast.Module, defined: frozenset[str]) -> tuple[set[str], list[str]]:
    """The names that tests use from the program, and their missing imports from the standard library, as lines of code.

    A name of a standard library module or of a `math` function is never taken from the program: else a program could define its
    own `isclose`.
    """
    loaded = {node.id for node in ast.walk(tests) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    free = loaded - _bound_names(tests) - defined - set(dir(builtins))
    modules = {name for name in free if name in sys.stdlib_module_names and name not in _NOT_IMPORTED}
    functions = {name for name in free - modules if hasattr(math, name)}
    imports = [f"import {name}" for name in sorted(modules)] + [f"from math import {name}" for name in sorted(functions)]
    return free - modules - functions, imports


def _tested_builtins(tests: list[ast.Module]) -> set[str]:
    """Built-in functions that every test calls: the tested function may have the name of a built-in."""
    called = [
        {node.func.id for node in ast.walk(test) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        for test in tests
    ]
    return set.intersection(*called) & set(dir(builtins)) if called else set()


def _bound_names(tree: ast.AST) -> set[str]:
    """Names that code assigns, defines or imports."""
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
