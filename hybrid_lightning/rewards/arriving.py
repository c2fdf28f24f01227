"""`ArrivingRewards`: completions are scored as they arrive, while others are still being generated.

    arriving = ArrivingRewards(reward, prompts)         before completions are begun
    arriving.add(row, completion)                       from any thread, as soon as one has ended
    evaluate_reward(reward, completions, prompts, arriving=arriving)        waits for those under way, and scores the others

The numbers are those that the reward gives for all completions together: only terms for which that holds are scored so (see
`RewardFunction.overlaps`).
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any

from torch import Tensor

from hybrid_lightning.rewards.reward_function import RewardFunction
from hybrid_lightning.rewards.terms import term_values
from hybrid_lightning.types import Prompt
from hybrid_lightning.user_calls import outcome_of
from hybrid_lightning.user_code import in_user_code


class ArrivingRewards:
    """The rewards of B completions that are scored one by one.

    Args:
        reward: The reward; the terms of a sum are scored apart.
        prompts: The B prompts, one for each completion.
    """

    def __init__(self, reward: RewardFunction, prompts: Sequence[Prompt]) -> None:
        self._prompts = prompts
        meanwhile = [(term, max((_overlaps(term, prompt) for prompt in prompts), default=0)) for term, _ in reward.terms()]
        self._of_terms = [(term, _Threads(most)) for term, most in meanwhile if most]
        self._values: dict[tuple[str, int], Future[Tensor]] = {}  # by name of the term and row

    @property
    def on_completion(self) -> Callable[[int, str], None] | None:
        """`add`, for engines; None where nothing is scored so."""
        return self.add if self._of_terms else None

    def add(self, row: int, completion: str) -> None:
        """Begin to score a completion, by its number."""
        for term, threads in self._of_terms:
            if (term.name, row) not in self._values and _overlaps(term, self._prompts[row]):
                work = partial(term_values, term, (completion,), (self._prompts[row],))
                self._values[term.name, row] = threads.submit(work)

    def values(self, term: RewardFunction, rows: Sequence[int], completions: Sequence[str]) -> dict[int, Tensor]:
        """Row -> value [1] of a term, of those rows that are scored one by one. It waits for them.

        Raises:
            RewardError: If the term raises, or returns no finite number, for the first such row.
        """
        try:
            for other, threads in self._of_terms:
                threads.allow(other.concurrency)
            for row in rows:
                self.add(row, completions[row])
            return {row: self._values[term.name, row].result() for row in rows if (term.name, row) in self._values}
        except BaseException:  # a signal, too
            self.cancel()
            raise

    def cancel(self) -> None:
        """Score no more: nobody needs it. A call that is under way goes on, and its result is ignored."""
        for _, threads in self._of_terms:
            threads.cancel()


def _overlaps(term: RewardFunction, prompt: Prompt) -> int:
    with in_user_code(term, "overlaps"):
        return term.overlaps(prompt)


class _Threads:
    """Threads that call functions, in order, `most` at the same time.

    They do not hold up the end of the process, as those of `concurrent.futures` do.
    """

    def __init__(self, most: int) -> None:
        self._most, self._running, self._lock = most, 0, threading.Lock()
        self._waiting: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()

    def submit(self, function: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._waiting.put((function, future))
        self.allow(self._most)
        return future

    def allow(self, most: int) -> None:
        """Let so many calls run at the same time from now on."""
        with self._lock:
            self._most = most
            for _ in range(min(most - self._running, self._waiting.qsize())):
                self._running += 1
                threading.Thread(target=self._run, daemon=True, name="rewards").start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._waiting.empty():
                    self._running -= 1
                    return
                function, future = self._waiting.get()
            value, error = outcome_of(function)
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)

    def cancel(self) -> None:
        with self._lock:
            while not self._waiting.empty():
                self._waiting.get()[1].cancel()
