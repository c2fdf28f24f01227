"""`ArrivingRewards`: scores completions as they arrive, while others are still being generated.

    arriving = ArrivingRewards(reward, prompts)         before completions begin
    arriving.add(row, completion)                       from any thread, as soon as a completion has ended
    evaluate_reward(reward, completions, prompts, arriving=arriving)        waits for calls in progress, and scores the others

The values are the same as if the reward scored all completions together: only terms with this property are scored early (see
`RewardFunction.overlaps`).
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from torch import Tensor

from hybrid_lightning.rewards.reward_function import RewardFunction
from hybrid_lightning.rewards.terms import term_values
from hybrid_lightning.shared.user_code import in_user_code
from hybrid_lightning.types import Prompt


class ArrivingRewards:
    """The rewards of B completions that are scored one by one, each in a thread.

    These threads do not hold up the end of the process, unlike those in `concurrent.futures`.

    Args:
        reward: The reward; the terms of a sum are scored separately.
        prompts: The B prompts, one for each completion.
    """

    def __init__(self, reward: RewardFunction, prompts: Sequence[Prompt]) -> None:
        self._prompts = prompts
        meanwhile = [(term, max((_overlaps(term, prompt) for prompt in prompts), default=0)) for term, _ in reward.terms()]
        self._turns = [(term, threading.Semaphore(most)) for term, most in meanwhile if most]
        # Further turns for each term, available after all completions have arrived.
        self._later = [max(0, term.concurrency - most) for term, most in meanwhile if most]
        self._values: dict[tuple[str, int], Future[Tensor]] = {}  # by name of the term and row

    @property
    def on_completion(self) -> Callable[[int, str], None] | None:
        """`add`, for engines; None if no term is scored early."""
        return self.add if self._turns else None

    def add(self, row: int, completion: str) -> None:
        """Start scoring the completion of a row."""
        for term, turns in self._turns:
            if (term.name, row) not in self._values and _overlaps(term, self._prompts[row]):
                value = self._values[term.name, row] = Future()
                given = (term, turns, value, completion, self._prompts[row])
                threading.Thread(target=_score, args=given, daemon=True, name="rewards").start()

    def values(self, term: RewardFunction, rows: Sequence[int], completions: Sequence[str]) -> dict[int, Tensor]:
        """Wait for the rows that are scored one by one; returns row -> value [1] of a term.

        Raises:
            RewardError: If the term raises or does not return a finite number; names the first such row.
        """
        try:
            later, self._later = self._later, []
            for (_, turns), more in zip(self._turns, later, strict=False):
                if more:
                    turns.release(more)
            for row in rows:
                self.add(row, completions[row])
            return {row: self._values[term.name, row].result() for row in rows if (term.name, row) in self._values}
        except BaseException:  # a signal, too
            self.cancel()
            raise

    def cancel(self) -> None:
        """Stop scoring. A call in progress continues, and its result is ignored."""
        for value in self._values.values():
            value.cancel()


def _overlaps(term: RewardFunction, prompt: Prompt) -> int:
    with in_user_code(term, "overlaps"):
        return term.overlaps(prompt)


def _score(term: RewardFunction, turns: threading.Semaphore, value: "Future[Tensor]", completion: str, prompt: Prompt) -> None:
    """Score a completion in its turn, unless the value has been cancelled."""
    with turns:
        if value.set_running_or_notify_cancel():
            try:
                value.set_result(term_values(term, (completion,), (prompt,)))
            except BaseException as error:  # raised where the value is awaited
                value.set_exception(error)
