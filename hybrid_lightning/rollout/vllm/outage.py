"""`Outage`: time limit for waiting while no server can be used, shared by all requests."""

import threading
import time

from lightning.pytorch.utilities import rank_zero_info

_GRACE_S = 1.0  # time until an outage is reported
_AGAIN_S = 60.0  # time until it is reported again


class Outage:
    """A time without a usable server, shared by all requests and updates, so that together they wait no longer than one of them.

    It is logged after a second, and then every minute.

    Args:
        limit: Seconds after which the run stops (`give_up_after`).

    Attributes:
        answered: Time of the last completed prompt on any server, by `time.monotonic`.
    """

    def __init__(self, limit: float) -> None:
        self.limit, self.answered = limit, 0.0
        self._since: float | None = None
        self._reported = 0.0
        self._lock = threading.Lock()

    def left(self, causes: str, since: float | None = None) -> float:
        """Seconds left while no server can be used, counted from now or from an earlier time; reported if there are causes."""
        now = time.monotonic()
        with self._lock:
            since = now if since is None else since
            self._since = since if self._since is None else min(since, self._since)
            lasted = now - self._since
            due = bool(causes) and lasted >= _GRACE_S and now - self._reported >= _AGAIN_S and lasted < self.limit
            if due:
                self._reported = now
        if due:
            so_far = "" if lasted < _AGAIN_S else f", {lasted:.0f} s so far"
            rank_zero_info(f"vLLM: no server answers, tried for up to {self.limit:.0f} s{so_far}: {causes}")
        return self.limit - lasted

    def end(self, answered: bool = False) -> None:
        """End the outage: a server can be used, or has `answered` with completions."""
        with self._lock:
            self.answered = time.monotonic() if answered else self.answered
            if self._since is not None and self._reported:
                rank_zero_info("vLLM: a server answers again")
            self._since, self._reported = None, 0.0
