"""Where a run spends its time: a clock for the phases of training, and the costs of a rollout spread over its optimizer steps.

Each moment belongs to exactly one phase, so the phases add up to the wall time however they are nested.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class PhaseClock:
    """Adds up the wall time of phases; of nested phases, the innermost counts.

    An accelerator works asynchronously, so a time is right only if the clock waits until the work is done. It waits at the end of
    a nested phase, and in `switch` if requested.

    Example:
        >>> clock = PhaseClock()
        >>> with clock.phase("generate"):
        ...     pass
        >>> list(clock.seconds())
        ['other', 'generate']
    """

    def __init__(self) -> None:
        self.restart("other", torch.device("cpu"))

    def restart(self, phase: str, device: torch.device) -> None:
        """Forget all times and begin `phase`, the first of those whose work `device` does."""
        self.device = device
        self._seconds = {phase: 0.0}
        self._running = [phase]
        self._since = time.perf_counter()

    def switch(self, phase: str, synchronize: bool = False) -> None:
        """End the running phase, optionally after its work on the device is done, and begin `phase`."""
        self._charge(synchronize)
        self._running[-1] = phase

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Context in which the phase is `name`; afterwards, even after an exception, the previous phase resumes."""
        self.enter(name)
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
        """Phase -> seconds since the restart, with the running phase up to now."""
        self._charge()
        return dict(self._seconds)

    def _charge(self, synchronize: bool = False) -> None:
        if synchronize and self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        now = time.perf_counter()
        phase = self._running[-1]
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._since
        self._since = now


class Amortized:
    """Spreads the costs of a rollout evenly over the optimizer steps that are made from it.

    If an epoch ends before all of these steps have been made, the next rollout's steps share the rest.

    Example:
        >>> amortized = Amortized()
        >>> amortized.put({"generate": 3.0}, steps=2)
        >>> amortized.take(), amortized.take(), amortized.take()
        ({'generate': 1.5}, {'generate': 1.5}, {'generate': 0.0})
    """

    def __init__(self, amounts: Mapping[str, float] | None = None, steps: int = 0) -> None:
        self.amounts = dict(amounts or {})  # name -> cost that no step has taken yet
        self.steps = steps  # remaining steps

    def put(self, amounts: Mapping[str, float], steps: int) -> None:
        """Add amounts, to be shared by the next `steps` steps."""
        self.amounts = {name: self.amounts.get(name, 0.0) + value for name, value in amounts.items()}
        self.steps = steps

    def take(self) -> dict[str, float]:
        """The share of the next step; zeros after the last one."""
        shares = {name: value / max(self.steps, 1) for name, value in self.amounts.items()}
        self.amounts = {name: value - shares[name] for name, value in self.amounts.items()}
        self.steps = max(self.steps - 1, 0)
        return shares
