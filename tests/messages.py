"""The messages of errors and warnings as the source has them."""

import ast
import re
from collections.abc import Collection, Iterator
from pathlib import Path

WARNING = {"warn", "rank_zero_warn"}


def warning_calls(tree: ast.AST, names: Collection[str] = WARNING) -> Iterator[ast.expr]:
    """The expression of each message that is warned with, or given to other functions of these names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in names:
                yield node.args[0]


def raised(tree: ast.AST) -> Iterator[ast.expr]:
    """The expression of each message that is raised, or given to an exception that is raised later."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            yield node.exc.args[0]
        elif isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name.endswith(("Error", "Warning")):
                yield node.args[0]


def warnings_of(paths: list[Path]) -> list[re.Pattern[str]]:
    """A pattern for each warning that files give; what only a run knows may be anything."""
    found = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        if "warn(" in text:
            for message in warning_calls(ast.parse(text)):
                pieces = message.values if isinstance(message, ast.JoinedStr) else [message]
                parts = [re.escape(str(piece.value)) if isinstance(piece, ast.Constant) else ".*" for piece in pieces]
                if any(len(part) > 10 for part in parts):
                    found.append(re.compile("".join(parts), re.DOTALL))
    return found
