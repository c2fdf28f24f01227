"""`CodeTests`: whether the Python program in a completion passes the tests of its problem, which run in a sandbox."""

import logging
import os
import re
from collections.abc import Sequence

from hybrid_lightning.errors import ConfigError, DataError
from hybrid_lightning.rewards.code_problem import read_problem
from hybrid_lightning.rewards.reward_function import RewardFunction
from hybrid_lightning.rewards.text import extract_match
from hybrid_lightning.sandbox.launch import Limits
from hybrid_lightning.sandbox.programs import CallTests, StandardStreamTests, make_settings, run_programs
from hybrid_lightning.shared.user_code import compile_pattern
from hybrid_lightning.types import Prompt

logger = logging.getLogger(__name__)
# Possessive quantifiers: without them the time for a long line would grow with the square of its length.
_BLOCK = re.compile(
    r"^[ \t]*+(?P<fence>`{3,}+|~{3,}+)[ \t]*+(?P<language>[\w+.-]*+)[^\n]*+\n(?P<code>.*?)(?:^[ \t]*+(?P=fence)|\Z)", re.M | re.S
)
_PYTHON = {"python", "py", "python3"}


class CodeTests(RewardFunction):
    r"""1.0 if the completion's Python program passes all tests of its problem, else 0.0.

    The tests are in a column of the row, in one of these forms:

    - code that defines `check(candidate)`, with the entry point in another column (LeetCodeDataset, HumanEval);
    - code with asserts, or a list of asserts, which call the program's functions by name (MBPP), also inside functions
      `test_...()` as for pytest (KodCode);
    - pairs of standard input and output: `{"inputs": [...], "outputs": [...]}` or `[{"input": ..., "output": ...}, ...]`,
      also as a JSON string (APPS, TACO). Space at the ends of lines is ignored, and the program must end without an error.

    A program runs in a sandbox (see `hybrid_lightning.sandbox.isolation`) with the standard library, and without sockets or other
    processes. The tests run in another sandboxed process. Only plain data passes between the two, so a program cannot see, change
    or outwit the tests. This limits what tests can do:

    - Results are compared as built-in types and as classes of the set-up code, such as ListNode.
    - A class of the program, such as `Bank()`, can be created and called, and its attributes can be read. Its methods are the
      code under test, and are trusted. Operators do not work on its objects, and tests cannot pass functions to the program.
    - If a function returns an object where a test expects data, methods of that object are not trusted: `result.equals(expected)`
      or `result.startswith("a")` fails.

    Args:
        test_column: Column with the tests.
        entry_point_column: Column with the expression that is passed to `check`, such as `Solution().twoSum`. Only tests that
            define `check` need it.
        setup_column: Column with code that runs before the program and the tests, such as imports. A row may leave it empty. None
            for no such column.
        pattern: Regular expression with one group for the program. The last match counts, no match earns 0, and `.` also
            matches line breaks. None takes the last fenced block of Python, else the last fenced block, else the whole text.
        partial_credit: Whether the reward is the share of tests that pass. A program that ends or runs out of time before its
            tests are done still earns 0.
        cpu_seconds: Limit on a program's CPU time in whole seconds, per run if it runs once for each input. It stops programs
            that compute too long, however busy the machine is.
        wall_seconds: Limit on a program's wall time, from start to end. It stops programs that wait.
        memory_mb: Memory of a program in MiB, with all its threads; its tests may use the same amount again.
        packages: Installed packages that programs and tests may import, such as `[sortedcontainers]`, which LeetCode offers; None
            for no packages.
        workers: Number of programs that run at the same time; None for the number of processors that this process may use. Give
            fewer if several ranks share a machine.
        allow_without_isolation: Whether programs may run on a machine that cannot isolate them. They then have all your
            permissions.
        name: Name in logs; None for `code_tests`.

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
            raise ConfigError(f"workers={workers}; give at least 1, or null for one per processor")
        if memory_mb < 128:
            raise ConfigError(f"memory_mb={memory_mb}; give at least 128")
        self.columns = (test_column, entry_point_column, setup_column)
        self.pattern = None if pattern is None else compile_pattern(pattern, groups=1)
        self.partial_credit = partial_credit
        limits = Limits(cpu_seconds=cpu_seconds, wall_seconds=wall_seconds, memory_bytes=memory_mb * 2**20)
        self.settings = make_settings(limits, packages or [], allow_without_isolation, partial_credit)
        self.workers = self.concurrency = workers or len(os.sched_getaffinity(0))
        self._name = name

    def overlaps(self, prompt: Prompt) -> int:
        """Half of `workers`: generation may also need the processors, and a program's wall time is limited."""
        return max(1, self.workers // 2)

    def check_prompt(self, prompt: Prompt) -> None:
        """Check that the row has tests that can be run."""
        self._problem(prompt)

    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[float]:
        """Run the program of each of B completions against the tests of its prompt."""
        problems = {key: self._problem(prompt) for key, prompt in {id(prompt): prompt for prompt in prompts}.items()}
        sources = [self._program(completion) or "" for completion in completions]
        positions = [position for position, source in enumerate(sources) if source.strip()]
        programs = [(sources[position], problems[id(prompts[position])]) for position in positions]
        rewards = [0.0] * len(completions)
        for position, outcome in zip(positions, run_programs(programs, self.settings, self.workers), strict=True):
            rewards[position] = outcome.share if self.partial_credit else float(outcome.passed == outcome.total)
            if outcome.reason:
                prompt = prompts[position]
                # unusable: no program can pass the tests of this row
                level = logging.WARNING if outcome.unusable else logging.DEBUG
                logger.log(level, "%s: %s: %s", self.name, prompt.place, outcome.reason)
        return rewards

    def decided_by_time(self) -> str | None:
        """A warning: on a busy machine, a program that gets no processor is stopped like a program that waits."""
        limits = self.settings.limits
        return (
            f"a program earns nothing if it is not done after wall_seconds={limits.wall_seconds:g}, even if other processes kept "
            f"the processor busy; on a busy machine, raise it well above cpu_seconds={limits.cpu_seconds}"
        )

    def extract_answer(self, completion: str, prompt: Prompt) -> str | None:
        """The program; two programs are equal if their texts are equal."""
        return (self._program(completion) or "").strip() or None

    def _program(self, completion: str) -> str | None:
        return extract_program(completion) if self.pattern is None else extract_match(self.pattern, completion)

    def _problem(self, prompt: Prompt) -> CallTests | StandardStreamTests:
        try:
            return read_problem(prompt.columns, *self.columns, self.partial_credit)
        except ValueError as error:
            raise DataError(
                f"{prompt.place} (the first is 0): CodeTests: {error}; correct or remove the row, or name the right columns; the "
                f"columns are {', '.join(prompt.columns) or 'none'}"
            ) from error


def extract_program(completion: str) -> str:
    r"""The last fenced block of Python, else the last fenced block, else the whole completion.

    A fence that is never closed ends with the completion, since the sampler may stop at the closing fence.

    Example:
        >>> extract_program("So:\n```python\nprint(1)\n```\nwhich prints\n```\n1\n```\n")
        'print(1)\n'
    """
    blocks = [(match["language"].lower(), match["code"]) for match in _BLOCK.finditer(completion)]
    python = [code for language, code in blocks if language in _PYTHON]
    return (python or [code for _, code in blocks] or [completion])[-1]
