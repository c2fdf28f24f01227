"""`MathMatch`: whether the answer is the same number or formula, by github.com/huggingface/Math-Verify.

Comparisons run in separate processes (`math_worker.py`): sympy may hang, and math-verify can stop it only in a main thread.
"""

import atexit
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from queue import LifoQueue
from typing import Any

from hybrid_lightning.errors import ConfigError, RewardError
from hybrid_lightning.rewards.multiple_choice import CHOICES, extract_choice, reference_choice
from hybrid_lightning.rewards.text import AnswerReward, reference_answer
from hybrid_lightning.types import Prompt

logger = logging.getLogger(__name__)

_PROCESSES = 4  # most processes that compare at the same time: each takes about 100 MB
_LETTERS = frozenset(CHOICES)
_PLAIN = re.compile(r"-?\d{1,15}(?:\.\d{1,9})?")  # form of most reference answers; it does not need the worker


class MathMatch(AnswerReward):
    r"""1.0 if the completion's answer equals the reference answer as mathematics, else 0.0.

    The answer of a completion is the content of its last `\boxed{}` (boxes joined by "and", "or" or a comma are one set). Without
    a box, it is the whole text, or the text after "the answer is", if that is a formula; else the last number, plain expression
    or LaTeX formula in `$ $`, `\( \)` or `\[ \]`. The text in `<think> </think>` is ignored, and so is a remark in brackets: "18
    dollars (9 eggs at $2)" is 18 dollars.

    - Forms: "5.0", "$5", "10/2" and `\frac{10}{2}` are 5; "1,234" is 1234; "2,5" is 2.5; "50%" is both 50 and 0.5. An inequality
      may equal an interval, and "y = 3 and x = 2" equals the point (2, 3).
    - Precision: decimals are compared to six places, as in math-verify, and numbers below 0.001 also to one part in a hundred.
    - Units: if both answers have a unit that `math_units.py` knows, the units must agree or be convertible: 15 cm are 0.15 m but
      not 15 m. "$5" may stand for "$5 per hour", but 5 m/s is not 5 m. Other units, such as apples, are not compared.
    - Bounds: neither a bound nor "1 hour and 30 minutes" is a number. "The answer is at least 18", "more than 18", "18 or more"
      and "18+" are wrong for 18. After other verbs, "at least 18" gives the number needed and is 18: "She needs at least 18
      eggs".

    The reference answer is one of these: a number, with or without a unit, which may be in brackets ("9 apples", "9 (apples)"); a
    formula, with or without LaTeX delimiters; or a letter from A to J, which is compared with the completion's choice, as in
    `MultipleChoice`.

    Args:
        pattern: Regular expression with one group for the answer. The last match counts, no match earns 0, and `.` also
            matches line breaks. None searches the whole completion for the answer.
        cpu_seconds: CPU time that one comparison may take. A completion that takes more earns 0, with a warning.
        name: Name in logs; None for `math_match`.

    Example:
        >>> prompt = Prompt(text="1/2 + 1/4?", answer="3/4")
        >>> MathMatch()(["It is 0.75.", r"\boxed{\frac{6}{8}}", "3/4 or 4/5", ""], [prompt] * 4)
        [1.0, 1.0, 0.0, 0.0]
    """

    def __init__(self, pattern: str | None = None, cpu_seconds: float = 3.0, name: str | None = None) -> None:
        if not cpu_seconds > 0:
            raise ConfigError(f"cpu_seconds={cpu_seconds}; give a positive number of seconds")
        if not hasattr(signal, "setitimer"):
            timer = f"{sys.platform} has no CPU timer to end long comparisons"
            raise ConfigError(f"MathMatch needs Linux or macOS: {timer}; train under WSL, or use ExactMatch")
        super().__init__(pattern, name)
        self.cpu_seconds = cpu_seconds
        self.concurrency = max(1, min(_PROCESSES, (os.cpu_count() or 1)))

    def overlaps(self, prompt: Prompt) -> int:
        """Half of the processes: generation may also need the processors."""
        return max(1, self.concurrency // 2)

    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[float]:
        """Score each of B completions, several at the same time."""
        if len(completions) < 2:
            return super().__call__(completions, prompts)
        with ThreadPoolExecutor(self.concurrency) as threads:
            return list(threads.map(self.score, completions, prompts))

    def extract_answer(self, completion: str, prompt: Prompt) -> str | None:
        """The compared number, formula or letter; 0.5 and 1/2 give the same text."""
        text = self.without_thinking(completion)
        if reference_choice(reference_answer(type(self).__name__, prompt)) in _LETTERS:
            return extract_choice(text, CHOICES)
        return _verifier(self.cpu_seconds).ask("canonical_answer", text)

    def check_prompt(self, prompt: Prompt) -> None:
        """Check that answers can be compared with the reference answer."""
        gold = reference_answer(type(self).__name__, prompt)
        readable = (
            reference_choice(gold) in _LETTERS or _PLAIN.fullmatch(gold) or _verifier(self.cpu_seconds).ask("is_gold", gold)
        )
        if not readable:
            number = re.match(r"-?\$?[\d.,/]*\d", gold.strip())
            pattern = r", such as answer_pattern='^(-?\$?[\d.,/]*\d)' for the number at its beginning" if number else ""
            raise RewardError(
                f"MathMatch: the reference answer {gold!r} of {prompt.place} is neither a number nor a formula; correct the row "
                f"or the source's answer_pattern{pattern}, or use ExactMatch"
            )

    def score(self, completion: str, prompt: Prompt) -> float:
        """Compare the answer with the reference answer."""
        self.check_prompt(prompt)
        gold = reference_answer(type(self).__name__, prompt)
        text = self.without_thinking(completion)
        if reference_choice(gold) in _LETTERS:
            return float(extract_choice(text, CHOICES) == reference_choice(gold))
        equal = _verifier(self.cpu_seconds).ask("equal", gold, text)
        if equal is None:
            told = "MathMatch gave up after %g s of CPU time on a completion ending %r; it earns 0"
            logger.warning(told, self.cpu_seconds, text[-80:])
        return float(bool(equal))


class MathVerifier:
    """Client of several worker processes, which start on first use."""

    def __init__(self, cpu_seconds: float) -> None:
        self._idle: LifoQueue[_Worker] = LifoQueue()
        for _ in range(_PROCESSES):
            self._idle.put(_Worker(cpu_seconds))

    def ask(self, function: str, *texts: str) -> Any:
        """Call a function of the worker (see `REQUESTS`) with texts; None if it exceeded the time or memory limit."""
        worker = self._idle.get()  # the most recently used one, so that no more processes start than needed
        try:
            return worker.ask(function, *texts)
        finally:
            self._idle.put(worker)


class _Worker:
    """A worker process, started at the first request, and again if it has died."""

    def __init__(self, cpu_seconds: float) -> None:
        self.cpu_seconds = cpu_seconds  # not wall time: a text gets the same reward on a busy machine
        self.process: subprocess.Popen[str] | None = None
        self._owner = 0  # id of the process that started the worker: a fork inherits the pipes, but must not use them
        atexit.register(self._close)

    def ask(self, function: str, *texts: str) -> Any:
        """See `MathVerifier`."""
        for _ in range(2):  # again if the system or another user ended the process, not the request
            process, reply = self._running(), ""
            assert process.stdin is not None and process.stdout is not None
            try:
                with suppress(BrokenPipeError):
                    print(json.dumps([function, *texts]), file=process.stdin, flush=True)
                    reply = process.stdout.readline()
            except BaseException:  # above all Ctrl-C: an unread reply would be read as the reply to the next request
                self._close()
                raise
            if reply:
                return json.loads(reply)
            out_of_time = process.wait() == -signal.SIGPROF
            self._close()
            if out_of_time:
                break
        return None

    def _running(self) -> "subprocess.Popen[str]":
        if self.process is None or self._owner != os.getpid():
            # -P keeps the script's folder off the import path: our modules there must not hide the standard library's.
            command = [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py")), str(self.cpu_seconds)]
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self.process = subprocess.Popen(command, encoding="utf-8", **pipes)
            self._owner = os.getpid()
            assert self.process.stdout is not None
            if self.process.stdout.readline() != "ready\n":
                self._close()
                raise RewardError(f"the process that compares answers does not start; run `{' '.join(command)}` to see why")
        return self.process

    def _close(self) -> None:
        process, self.process = self.process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()


_verifier = cache(MathVerifier)  # shared by rewards with the same time limit; not an attribute, since rewards are copied
