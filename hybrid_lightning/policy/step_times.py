"""Where the time goes: a clock that charges every moment to one phase, and amounts spread over optimizer steps.

Since each moment belongs to exactly one phase, the phases add up to the wall time by construction, whatever runs inside what.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class PhaseClock:
    """Charges wall time to phases; of nested ones the innermost counts.

    Work on an accelerator runs behind the program, so a stamp says something only once it is finished. The clock waits for it
    where a nested phase ends and where `switch` is told to, and nowhere else.

    Example:
        >>> clock = PhaseClock()
        >>> with clock.phase("generate"):
        ...     pass
        >>> list(clock.seconds())
        ['other', 'generate']
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")  # on which the phases' work runs
        self.restart("other")

    def restart(self, phase: str) -> None:
        """Forget everything and begin in `phase`."""
        self._seconds = {phase: 0.0}
        self._running = [phase]
        self._since = time.perf_counter()

    def switch(self, phase: str, synchronize: bool = False) -> None:
        """End the running phase and begin `phase`.

        Args:
            phase: What runs from now on.
            synchronize: Whether the running phase's work on the device has to be finished first.
        """
        self._charge(synchronize)
        self._running[-1] = phase

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge what runs within to `name` and go on with what ran before; also after an exception."""
        self._charge()
        self._running.append(name)
        try:
            yield
        finally:
            self.leave()

    def enter(self, name: str) -> None:
        """Begin a nested phase that `leave` ends; for a pair of hooks, which cannot share a `with` block."""
        self._charge()
        self._running.append(name)

    def leave(self) -> None:
        """End the innermost phase."""
        self._charge(synchronize=True)
        self._running.pop()

    def seconds(self) -> dict[str, float]:
        """Seconds of every phase since the restart, the running one included."""
        self._charge()
        return dict(self._seconds)

    def _charge(self, synchronize: bool = False) -> None:
        if synchronize and self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        now = time.perf_counter()
        phase = self._running[-1]
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._since
        self._since = now


class Spread:
    """Deals what a rollout cost evenly to the optimizer steps that it serves, so that their shares add up to it.

    What steps that never came have left over (an epoch that ended within a rollout) goes to those of the next rollout.

    Example:
        >>> spread = Spread()
        >>> spread.put({"generate": 3.0}, steps=2)
        >>> spread.take(), spread.take(), spread.take()
        ({'generate': 1.5}, {'generate': 1.5}, {'generate': 0.0})
    """

    def __init__(self, amounts: Mapping[str, float] | None = None, steps: int = 0) -> None:
        self.amounts = dict(amounts or {})  # still to be dealt
        self.steps = steps  # still to come

    def put(self, amounts: Mapping[str, float], steps: int) -> None:
        """Add amounts, for the next `steps` steps."""
        self.amounts = {name: self.amounts.get(name, 0.0) + value for name, value in amounts.items()}
        self.steps = steps

    def take(self) -> dict[str, float]:
        """The share of one step; zeros when all has been dealt."""
        shares = {name: value / max(self.steps, 1) for name, value in self.amounts.items()}
        self.amounts = {name: value - shares[name] for name, value in self.amounts.items()}
        self.steps = max(self.steps - 1, 0)
        return shares
