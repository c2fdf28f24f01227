"""`Outage`: how long servers that cannot be used are waited for, whatever is asked of them meanwhile."""

import threading
import time

from lightning.pytorch.utilities import rank_zero_info

_GRACE_S = 1.0  # after which an outage is reported
_AGAIN_S = 60.0  # after which it is reported again


class Outage:
    """A time in which no server can be used, shared by all requests and updates, so that together they take no longer than one.

    It is reported at once and every minute.

    Args:
        limit: Seconds after which the run stops (`give_up_after`).

    Attributes:
        answered: When a server completed a prompt last, by `time.monotonic`.
    """

    def __init__(self, limit: float) -> None:
        self.limit, self.answered = limit, 0.0
        self._since: float | None = None
        self._reported = 0.0
        self._lock = threading.Lock()

    def left(self, causes: str, since: float | None = None) -> float:
        """Seconds that are left, as no server can be used: from now on, or since a time before. Reported if there are causes."""
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
        """A server can be used, or has `answered` with completions."""
        with self._lock:
            self.answered = time.monotonic() if answered else self.answered
            if self._since is not None and self._reported:
                rank_zero_info("vLLM: a server answers again")
            self._since, self._reported = None, 0.0
