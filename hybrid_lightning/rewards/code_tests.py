"""The program in a completion.

A program that passes its problem's tests.
"""

import logging
import os
import re
from collections.abc import Sequence

from hybrid_lightning.errors import ConfigError, DataError
from hybrid_lightning.rewards.code_problem import read_problem
from hybrid_lightning.rewards.reward_function import RewardFunction
from hybrid_lightning.rewards.text import compile_pattern, extract
from hybrid_lightning.sandbox.isolation import require_isolation
from hybrid_lightning.sandbox.launch import Limits
from hybrid_lightning.sandbox.programs import (
    CallTests,
    Outcome,
    Settings,
    StandardStreamTests,
    check_packages,
    find_packages,
    run_programs,
)
from hybrid_lightning.types import Prompt

# Possessive quantifiers: a long line must not take time that grows with its square.
_BLOCK = re.compile(
    r"^[ \t]*+(?P<fence>`{3,}+|~{3,}+)[ \t]*+(?P<language>[\w+.-]*+)[^\n]*+\n(?P<code>.*?)(?:^[ \t]*+(?P=fence)|\Z)", re.M | re.S
)
_PYTHON = {"python", "py", "python3"}


def extract_program(completion: str) -> str:
    r"""The last fenced block of Python, else the last fenced block, else the whole completion.

    A fence that is never closed ends with the completion: the sampler may stop at the closing one.

    Args:
        completion: The text.

    Example:
        >>> extract_program("So:\n```python\nprint(1)\n```\nwhich prints\n```\n1\n```\n")
        'print(1)\n'
    """
    blocks = [(match["language"].lower(), match["code"]) for match in _BLOCK.finditer(completion)]
    python = [code for language, code in blocks if language in _PYTHON]
    return (python or [code for _, code in blocks] or [completion])[-1]


logger = logging.getLogger(__name__)


class CodeTests(RewardFunction):
    r"""1.0 if the completion's Python program passes all tests of its problem, else 0.0.

    The tests are a column of the row, in one of these forms:

    - code that defines `check(candidate)`, and a column with the entry point (LeetCodeDataset, HumanEval);
    - code with asserts, or a list of asserts, which call the program's functions by name (MBPP), also within functions
      `test_...()` as for pytest (KodCode);
    - pairs of standard input and output: `{"inputs": [...], "outputs": [...]}` or `[{"input": ..., "output": ...}, ...]`,
      also as JSON in a text (APPS, TACO). Lines are compared without space at their ends, and the program must end without error.

    Programs run in a sandbox (see `hybrid_lightning.sandbox.isolation`), with the standard library and without sockets and
    other processes. The tests run in another process than the program, in a sandbox as well, and only plain data goes between
    them: a program cannot see, change or outwit the tests. So results are compared as built-in types and classes of the set-up
    code, such as ListNode; other objects of a program, such as a stack class, can be made, called and asked for attributes, but
    no operator reaches them, and a function of the tests cannot be handed to the program. What a function returns is not asked
    for its own opinion where a test expects data: `result.equals(expected)` or `result.startswith("a")` of an object of the
    program fails. Methods of a class that the tests name, such as `Bank()`, are what is tested, and are believed.

    Args:
        test_column: Column with the tests.
        entry_point_column: Column with the expression that `check` is called with, such as `Solution().twoSum`; a row may lack it
            if its tests define no `check`.
        setup_column: Column with code that runs before the program and the tests, such as imports; a row may lack it. None for
            none.
        pattern: Regular expression with one group, the program; the last match counts, no match earns nothing, `.` also matches
            line breaks. None: the last fenced block of Python, else the last fenced block, else the whole completion.
        partial_credit: Whether the share of the tests that pass is the reward. A program that ends or runs out of time
            before its tests are done earns nothing.
        cpu_seconds: CPU time of a program, in whole seconds; of each run, where it runs once for each input.
        wall_seconds: Time of a program from start to end. Programs that compute are stopped by `cpu_seconds`, whatever else the
            machine does; this stops those that wait.
        memory_mb: Memory of a program, in MiB, with all its threads; its tests may use as much again.
        packages: Installed packages that programs and tests may import, such as `[sortedcontainers]`, which LeetCode offers; None
            for none.
        workers: Programs that run at the same time; None for the number of processors that this process may use. Give fewer
            where several ranks share a machine.
        allow_without_isolation: Whether programs may run where they cannot be isolated. They can then do whatever you can.
        name: What it is logged as; None for `code_tests`.

    Raises:
        ConfigError: If an argument is out of range, or programs cannot import a package.
        SandboxError: If programs cannot be isolated on this machine.

    Example:
        >>> prompt = Prompt(text="Double x.", columns={"test": "assert double(2) == 4"})
        >>> CodeTests()(["def double(x): return 2 * x", "def double(x): return x"], [prompt] * 2)
        [1.0, 0.0]
    """

    def __init__(
        self,
        test_column: str = "test",
        entry_point_column: str | None = "entry_point",
        setup_column: str | None = "prompt",
        pattern: str | None = None,
        partial_credit: bool = False,
        cpu_seconds: int = 5,
        wall_seconds: float = 10.0,
        memory_mb: int = 512,
        packages: list[str] | None = None,
        workers: int | None = None,
        allow_without_isolation: bool = False,
        name: str | None = None,
    ) -> None:
        if workers is not None and workers < 1:
            raise ConfigError(f"workers={workers}: give at least 1, or null for one a processor")
        if memory_mb < 128:
            raise ConfigError(f"memory_mb={memory_mb}: give at least 128")
        self.test_column = test_column
        self.entry_point_column = entry_point_column
        self.setup_column = setup_column
        self.pattern = None if pattern is None else compile_pattern(pattern, groups=1)
        self.partial_credit = partial_credit
        self.settings = Settings(
            mechanisms=require_isolation(allow_without_isolation).mechanisms,
            limits=Limits(cpu_seconds=cpu_seconds, wall_seconds=wall_seconds, memory_bytes=memory_mb * 2**20),
            packages=find_packages(packages or []),
            count_all=partial_credit,
        )
        check_packages(packages or [], self.settings.packages, self.settings.mechanisms, self.settings.limits)
        self.workers = workers or len(os.sched_getaffinity(0))
        self._name = name

    def check_prompt(self, prompt: Prompt) -> None:
        """Make sure that the row has tests which can be run."""
        self._problem(prompt)

    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[float]:
        """Run the program of each completion, of B."""
        problems: dict[int, CallTests | StandardStreamTests] = {}
        programs, positions = [], []
        for position, (completion, prompt) in enumerate(zip(completions, prompts, strict=True)):
            if id(prompt) not in problems:
                problems[id(prompt)] = self._problem(prompt)
            source = extract_program(completion) if self.pattern is None else extract(self.pattern, completion)
            if source is not None and source.strip():
                programs.append((source, problems[id(prompt)]))
                positions.append(position)
        rewards = [0.0] * len(completions)
        outcomes = run_programs(programs, self.settings, self.workers)
        for position, outcome in zip(positions, outcomes, strict=True):
            rewards[position] = self._reward(outcome)
            if outcome.reason:
                prompt = prompts[position]
                level = logging.WARNING if outcome.unusable else logging.DEBUG  # no program can earn anything by such a row
                logger.log(level, "%s: %s row %s: %s", self.name, prompt.source or "a prompt", prompt.index, outcome.reason)
        return rewards

    def decided_by_time(self) -> str | None:
        """A program that others keep from running is stopped like one that waits."""
        limits = self.settings.limits
        return (
            f"a program earns nothing if it is not done after wall_seconds={limits.wall_seconds:g}, also where others took its "
            f"processor; where the machine is busy, raise it well above the {limits.cpu_seconds} s of cpu_seconds"
        )

    def extract_answer(self, completion: str, prompt: Prompt) -> str | None:
        """The program; two agree if they are the same text."""
        source = extract_program(completion) if self.pattern is None else extract(self.pattern, completion)
        return None if source is None else source.strip() or None

    def _reward(self, outcome: Outcome) -> float:
        return outcome.share if self.partial_credit else float(outcome.passed == outcome.total)

    def _problem(self, prompt: Prompt) -> CallTests | StandardStreamTests:
        try:
            return read_problem(prompt.columns, self.test_column, self.entry_point_column, self.setup_column, self.partial_credit)
        except ValueError as error:
            raise DataError(
                f"{prompt.source or 'a prompt'}, row {prompt.index} (the first is 0): CodeTests: {error}; correct or remove the "
                f"row, or name the right columns; it has {', '.join(prompt.columns) or 'none'}"
            ) from error
