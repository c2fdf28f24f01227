"""Tools for policies: a calculator, a Python session, and search over local documents.

Each answers in plain text, even to wrong arguments, so that a policy can read the error and continue.
"""

import ast
import json
import operator
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from functools import cache
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Any

from hybrid_lightning.environments.tool import Tool
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.sandbox.candidate import WHOLE
from hybrid_lightning.sandbox.launch import Box, Limits, launch
from hybrid_lightning.sandbox.programs import make_settings

_LONGEST = 1_000  # characters of an expression
_BITS = 1_024  # in numerators and denominators: 308 digits
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def calculator(expression: str) -> str:
    """Calculate an arithmetic expression.

    Args:
        expression: Numbers with + - * / // % ** and parentheses, such as "(2 + 3) * 4.5".

    Example:
        >>> calculator("347*68"), calculator("1,200 * 0.1"), calculator("2/3"), calculator("1/0")
        ('23596', '120', '0.666666666666667', 'error: division by zero')
    """
    # Exact fractions, in a tree that Python only parses, never evaluates; all sizes are bounded before they are reached.
    unknown = re.search(r"[^0-9.,+\-*/%()\s]", expression)
    if unknown:
        return f"error: {unknown[0]!r} is not understood; give numbers with + - * / // % ** and parentheses"
    if len(expression) > _LONGEST:
        return f"error: the expression is longer than {_LONGEST} characters"
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", " ".join(expression.split()))
    try:
        value = _value(ast.parse(plain, mode="eval").body)
    except ZeroDivisionError:
        return "error: division by zero"
    except ArithmeticError as error:
        return f"error: {error}"
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # Python's parser raises these
        return "error: this is no expression; give numbers with + - * / // % ** and parentheses"
    return str(value) if value.denominator == 1 else format(float(value), ".15g")


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return _bounded(Fraction(str(node.value)))  # a float by its shortest text: 0.1 is a tenth
    if isinstance(node, ast.UnaryOp):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if not isinstance(node, ast.BinOp):
        raise ValueError("no arithmetic")
    left, right = _value(node.left), _value(node.right)
    return _bounded(_power(left, right) if isinstance(node.op, ast.Pow) else Fraction(_OPERATORS[type(node.op)](left, right)))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator == 1:
        if abs(exponent) * max(_bits(base), 1) > 2 * _BITS:  # a number of n bits is at least 2^(n - 1)
            raise OverflowError("the number is too large")
        return Fraction(base**exponent)
    if base < 0:
        raise ArithmeticError("a root of a negative number is no real number")
    try:
        return Fraction(float(base) ** float(exponent))
    except OverflowError:
        raise OverflowError("the number is too large") from None


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _bounded(value: Fraction) -> Fraction:
    if _bits(value) > _BITS:
        raise OverflowError("the number is too large")
    return value


class PythonSession(Tool):
    """Sandboxed Python. Names stay defined across the calls of an episode.

    No process runs between calls: each call runs the code of the earlier calls again, in a new sandbox, and returns what the last
    one prints. If code hangs or crashes, later calls leave it out; slow code slows all later calls. `random` is seeded by the
    episode. Other values that differ from run to run, such as the time, change with each call. Code is isolated like the programs
    of `CodeTests`.

    Args:
        cpu_seconds: Limit on the CPU time of a call in whole seconds, without the time of the earlier calls.
        wall_seconds: Limit on the wall time of a call, without the time of the earlier calls.
        memory_mb: Memory of a session in MiB.
        packages: Installed packages that may be imported, with their dependencies; None for only the standard library.
        allow_without_isolation: Whether code may run on a machine that cannot isolate it. It then has all your permissions.

    Raises:
        ConfigError: If an argument is out of range, or a package cannot be imported.
        SandboxError: If code cannot be isolated on this machine.

    Example:
        >>> python = PythonSession()
        >>> python("x = 6")
        '(no output)'
        >>> python("print(x)\\nx * 7")
        '6\\n42'
    """

    def __init__(
        self,
        cpu_seconds: int = 5,
        wall_seconds: float = 10.0,
        memory_mb: int = 512,
        packages: list[str] | None = None,
        allow_without_isolation: bool = False,
    ) -> None:
        limits = Limits(cpu_seconds=cpu_seconds, wall_seconds=wall_seconds, memory_bytes=memory_mb * 2**20)
        self.settings = _settings(limits, tuple(packages or ()), allow_without_isolation)
        self.start(0)

    def start(self, seed: int) -> None:
        """Begin an episode without any names."""
        self.seed, self.cells = seed, list[str]()
        self.cpu_s, self.wall_s = 0.0, 0.0  # times of the cells when they last ran

    def __call__(self, code: str) -> str:
        """Run Python code. Names stay defined for the next call.

        Args:
            code: The code. What it prints is returned, and the value of the expression in its last line.
        """
        own, settings = self.settings.limits, self.settings
        limits = replace(own, cpu_seconds=own.cpu_seconds + ceil(self.cpu_s), wall_seconds=own.wall_seconds + self.wall_s)
        started = time.monotonic()
        box = Box("cells", {"cells": [*self.cells, code], "seed": self.seed})
        ran = launch([box], settings.mechanisms, limits, settings.packages)
        whole = re.search(rb"%s (\d{1,9})\Z" % WHOLE, ran.stderr)
        if not (ran.in_time and whole):
            ending = (ran.endings.get("cells") or "it ended Python") if ran.in_time else f"not done after {own.wall_seconds:g} s"
            return f"error: {ending}; names are as before this call"
        self.cells.append(code)
        # Code could report a wrong time, so it is bounded by the limit.
        self.cpu_s = min(int(whole[1]) / 1000, limits.cpu_seconds)
        self.wall_s = min(time.monotonic() - started, limits.wall_seconds)
        return ran.stdout.decode(errors="replace").strip() or "(no output)"


_settings = cache(make_settings)  # made once, although each episode has its own tool


class DocumentSearch(Tool):
    """Search over local documents by BM25 (Robertson and Zaragoza, 2009), with the package bm25s.

    Documents are one file, or all `.txt`, `.md` and `.jsonl` files in a folder and its subfolders. Text files are split into
    passages at empty lines; each line of a `.jsonl` file is a passage, with its text in `text` and optionally a name in `title`.

    Args:
        path: The file or folder.
        passages: Largest number of passages to return.
        passage_words: Approximate number of words in a passage of a text file: paragraphs are joined up to this length, not cut.

    Raises:
        ConfigError: If bm25s is not installed, or there are no documents.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "tea.txt").write_text("Green tea is steeped at 80 degrees.\\n\\nBlack tea takes boiling water.")
        ...     DocumentSearch(folder, passages=1, passage_words=5)("how hot for green tea?")
        '[tea.txt 1] Green tea is steeped at 80 degrees.'
    """

    def __init__(self, path: str, passages: int = 3, passage_words: int = 100) -> None:
        if passages < 1 or passage_words < 1:
            raise ConfigError(f"DocumentSearch: passages={passages}, passage_words={passage_words}; give at least 1 of each")
        if find_spec("bm25s") is None:
            raise ConfigError("DocumentSearch needs the package bm25s; pip install 'hybrid-lightning[search]'")
        self.path, self.passages, self.passage_words = Path(path).expanduser(), passages, passage_words
        if not self.path.exists():
            raise ConfigError(f"DocumentSearch: {path!r} does not exist; give a folder or file of {_KINDS}")
        with _INDEXING:
            self.index = _Index.of(self.path.resolve(), passage_words)

    def __call__(self, query: str) -> str:
        """Search the documents.

        Args:
            query: Words to look for.
        """
        found = self.index.best(query, self.passages)
        return "\n\n".join(f"[{name}] {text}" for name, text in found) or "nothing found; try other words"


_KINDS = ".txt, .md or .jsonl"
_INDEXING = threading.Lock()  # episodes begin concurrently, and an index is built once


class _Index:
    """Passages and their words, built once per process for all episodes."""

    def __init__(self, path: Path, passage_words: int) -> None:
        from bm25s import BM25

        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        files = [file for file in files if file.suffix in (".txt", ".md", ".jsonl")]
        folder = path if path.is_dir() else path.parent
        self.entries = [
            (f"{file.relative_to(folder).as_posix()} {number}" if title is None else title, text)
            for file in files
            for number, (title, text) in enumerate(_passages(file, passage_words), 1)
        ]
        if not any(map(_words, (text for _, text in self.entries))):
            raise ConfigError(f"DocumentSearch: {str(path)!r} holds no text; give a folder or file of {_KINDS}")
        self.ranking = BM25()
        self.ranking.index([_words(f"{name} {text}") for name, text in self.entries], show_progress=False)

    @staticmethod
    @cache
    def of(path: Path, passage_words: int) -> "_Index":
        return _Index(path, passage_words)

    def best(self, query: str, count: int) -> list[tuple[str, str]]:
        """The best passages; ties go to the first."""
        words = _words(query)
        if not words:
            return []
        scores = self.ranking.get_scores(words)
        order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
        return [self.entries[place] for place in order[:count] if scores[place] > 0]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _passages(file: Path, words: int) -> Iterator[tuple[str | None, str]]:
    """Name (None if it has none) and text of each passage of a file."""
    text = file.read_text(encoding="utf-8", errors="replace")
    if file.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                title = entry.get("title")
                yield None if title is None else str(title), str(entry["text"])
            except (ValueError, AttributeError, KeyError) as error:
                raise ConfigError(f'{file}, line {number} is not an object with "text"; correct or remove the line') from error
        return
    joined: list[str] = []
    for paragraph in filter(None, map(str.strip, re.split(r"\n\s*\n", text))):
        if joined and sum(len(part.split()) for part in (*joined, paragraph)) > words:
            yield None, "\n".join(joined)
            joined = []
        joined.append(paragraph)
    if joined:
        yield None, "\n".join(joined)
