"""What tests in Python use, found by reading them: nothing of a data set runs in the training process."""

import ast
import builtins
import importlib
import math
import sys
from functools import lru_cache

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
