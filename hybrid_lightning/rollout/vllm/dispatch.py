"""`Dispatch`: distributes the requests of a rollout over vLLM servers as they come, and gives failed requests to other servers.

A server gets a request when it has room, so a slow server gets fewer. A server that fails is set aside, for longer each time, and
checked again. A server with other weights, because it was restarted, stays aside until it receives the policy's weights. A server
that has not completed anything for a moment is checked, too: it may hang. Each rollout begins with a check of all servers. All
rollouts share the time limit for having no usable server (`Outage`).
"""

import asyncio
import contextlib
import itertools
import threading
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybrid_lightning.errors import ConfigError, RolloutError
from hybrid_lightning.rollout.future import in_thread
from hybrid_lightning.rollout.vllm.completing import Answer
from hybrid_lightning.rollout.vllm.outage import Outage
from hybrid_lightning.rollout.vllm.server_client import Server, ServerError

if TYPE_CHECKING:
    import httpx

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_SLICE_S = 0.1  # interval of checks for work
_FAREWELL_S = 2.0  # time to notify servers that answers are no longer needed
_LOOK_S = 30.0  # time limit for a server to report its weights
_QUIET_S = 2.0  # time without an answer from a server in use, after which it is asked for its weights
_LOST = 2  # failures in a row after which a server is reported: a single one, or a slow answer, happens under load
_GRACE_S = 1.0  # time for all servers to report, before requests go to the ones that have
STARTED = "default"  # vLLM's label of the weights that a server was started with
_ENDED = "the requests to vLLM servers were ended"
_ON_THEIR_WAY = "its weights are on their way"


class IdleClock:
    """Measures the time in which no rollout has an open request."""

    def __init__(self) -> None:
        self._lock, self._open, self._idle_s = threading.Lock(), 0, 0.0
        self._since: float | None = None  # when the last request was answered; None before the first one

    def opened(self) -> None:
        """A request begins."""
        with self._lock:
            if not self._open and self._since is not None:
                self._idle_s += time.monotonic() - self._since
            self._open += 1

    def answered(self) -> None:
        """A request has ended."""
        with self._lock:
            self._open -= 1
            self._since = time.monotonic()

    def take(self) -> float:
        """Seconds without an open request, between the requests since the last call and before the first of them."""
        with self._lock:
            idle, self._idle_s = self._idle_s, 0.0
        return idle


@dataclass(eq=False)
class _Request:
    """A prompt to complete."""

    number: int
    ids: Sequence[int]
    parameters: dict[str, Any]
    answer: "Future[list[Answer]]"
    failures: int = 0
    failing_since: float = 0.0
    not_before: float = 0.0
    begun: float = 0.0
    last: "_Place | None" = None


@dataclass(eq=False)
class _Place:
    """A server, and its condition in this rollout."""

    server: Server
    room: int  # requests that it may have at once
    answered_at: float  # time of its last correct answer
    usable: bool = False
    restarted: bool = False  # it has the weights that it was started with
    checking: bool = False  # a check is in progress
    misses: int = 0  # failed requests and checks in a row
    failures: int = 0  # since its last answer
    aside_until: float = 0.0
    running: int = 0
    stale: bool = False
    why: str = "it was not reached yet"


class Dispatch:
    """The requests of one rollout.

    Args:
        servers: The servers.
        label: Label of the weights that they should have.
        updating: Label of a server that is receiving weights.
        samples: Completions of a prompt in a request, at most.
        timeout: Longest time for a request in seconds.
        outage: Ends the rollout when servers have failed for too long.
        idle: Is told of requests.

    Raises:
        ConfigError: If a server cannot complete a prompt this many times at once.
    """

    _client: "httpx.AsyncClient"

    def __init__(
        self, servers: Sequence[Server], label: str, updating: str, samples: int, timeout: float, outage: Outage, idle: IdleClock
    ) -> None:
        self._labels, self._updating = [label], updating  # labels that tokens may have
        self._timeout, self._outage, self._idle = timeout, outage, idle
        self._check_s = min(_LOOK_S, max(1.0, outage.limit / 3))
        self._began = time.monotonic()
        self._places = [_Place(server, _room(server, samples), self._began) for server in servers]
        self._numbers = itertools.count()
        self._waiting = deque[_Request]()
        self._open: set[_Request] = set()  # requests without an answer
        self._tasks: dict[asyncio.Task[Any], tuple[_Place, _Request | None]] = {}  # without a request: a check of the server
        self._farewells = set[asyncio.Task[None]]()
        self._name = uuid.uuid4().hex
        self._is_ending = False
        # In a separate thread: the caller's may already have an event loop, as in notebooks, and code of users runs on another.
        self._loop = loop = asyncio.new_event_loop()
        self._main = main = loop.create_task(self._complete())
        self._wake = asyncio.Event()

        def work() -> None:
            try:
                loop.run_until_complete(main)
            finally:
                loop.close()
                self._fail_open(RolloutError(_ENDED))

        self._work = in_thread(work, "requests to vLLM servers")

    def submit(self, ids: Sequence[int], parameters: dict[str, Any]) -> "Future[list[Answer]]":
        """Begin to complete a prompt, from any thread.

        Args:
            ids: Token ids of the prompt.
            parameters: Arguments of vLLM's `SamplingParams`.

        Returns:
            The answers, in order. Its exception is a RolloutError if no server completes the prompt.
        """
        request = _Request(next(self._numbers), ids, parameters, Future())
        self._idle.opened()
        request.answer.add_done_callback(lambda _: self._idle.answered())
        try:
            self._loop.call_soon_threadsafe(self._take_in, request)
        except RuntimeError:  # it has ended
            failure = self._work.exception() if self._work.done() and not self._work.cancelled() else None
            request.answer.set_exception(failure or RolloutError(_ENDED))
        return request.answer

    def _take_in(self, request: _Request) -> None:
        now = time.monotonic()
        for place in () if self._open else self._places:  # nothing was asked, so nothing was answered
            place.answered_at = max(place.answered_at, now)
        self._open.add(request)
        self._waiting.append(request)
        self._assign(now)

    def _fail_open(self, failure: BaseException) -> None:
        for request in self._open:
            if request.answer.set_running_or_notify_cancel():
                request.answer.set_exception(failure)
        self._open = set()

    def accept_weights(self, label: str) -> None:
        """Accept answers sampled with new weights for open requests: servers are receiving these weights."""
        if label not in self._labels:
            self._labels.append(label)
        for place in self._places:
            place.aside_until = 0.0

    @property
    def has_lost_weights(self) -> bool:
        """Whether nothing can be completed until restarted servers receive weights."""
        running = not self._work.done() and not any(place.usable for place in self._places)
        return running and any(place.restarted for place in self._places)

    def leave(self, server: Server) -> None:
        """Give a server's unanswered requests to others: it did not take the weights, and is paused."""
        with contextlib.suppress(RuntimeError):  # it has ended in the meantime
            self._loop.call_soon_threadsafe(self._leave, server)

    def _leave(self, server: Server) -> None:
        for task, (place, _) in self._tasks.items():
            if place.server is server:
                task.cancel()

    @property
    def has_ended(self) -> bool:
        """Whether it takes no more requests."""
        return self._work.done()

    def end(self) -> None:
        """Begin to end the requests."""
        if self._is_ending:
            return  # or the notification of the servers would be ended, too
        self._is_ending = True
        with contextlib.suppress(RuntimeError):  # it has ended in the meantime
            self._loop.call_soon_threadsafe(self._main.cancel)

    def wait(self) -> None:
        """Wait a little for the end that `end` has begun."""
        wait([self._work], 2 * _FAREWELL_S)

    async def _complete(self) -> None:
        """Make requests until `end`."""
        async with self._places[0].server.connections() as self._client:
            try:
                while True:
                    now = time.monotonic()
                    if self._open:
                        self._give_up()
                        self._check_servers(now)
                        self._assign(now)
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._wake.wait(), _SLICE_S)
                    self._wake.clear()
                    for task in [task for task in self._tasks if task.done()]:
                        self._take(task, *self._tasks.pop(task))
            except RolloutError as failure:
                self._fail_open(failure)
                raise
            finally:
                await self._end_all()

    def _check_servers(self, now: float) -> None:
        """Request the label of the weights from servers that are not in use, or have not answered for a while."""
        for place in self._places:
            quiet = now - place.answered_at > min(_QUIET_S, self._check_s)
            due = quiet if place.usable else now >= place.aside_until
            if due and not (place.stale or place.checking):
                place.checking = True
                self._begin(self._check_s, place, None, place.server.label_now(self._client))

    def _assign(self, now: float) -> None:
        """Give waiting requests to the servers with the most room."""
        if now - self._began <= _GRACE_S and any(place.checking for place in self._places):
            return
        for _ in range(len(self._waiting)):
            free = [place for place in self._places if place.usable and place.running < place.room]
            if not free:
                return
            request = self._waiting.popleft()
            if now < request.not_before:
                self._waiting.append(request)
                continue
            place = min(free, key=lambda place: (place is request.last, place.running / place.room))
            place.running += 1
            request.begun = now
            answers = place.server.complete(self._client, self._name_of(request), request.ids, request.parameters)
            self._begin(self._timeout, place, request, answers)

    def _begin(self, limit: float, place: _Place, request: _Request | None, answer: Awaitable[Any]) -> None:
        """Wait for an answer in parallel; a late one is ended by closing its connection."""

        async def within() -> Any:
            try:
                async with asyncio.timeout(limit):
                    return await answer
            except TimeoutError as error:
                cause = f"no answer within {limit:.0f} s; it hangs or is overloaded"
                raise ServerError(place.server.url, cause) from error

        task = asyncio.create_task(within())
        task.add_done_callback(lambda _: self._wake.set())
        self._tasks[task] = (place, request)

    def _take(self, task: asyncio.Task[Any], place: _Place, request: _Request | None) -> None:
        """Process a result: a server's weights, or the answers to a request."""
        if request is None:
            place.checking = False
        else:
            place.running -= 1
        try:
            found = task.result()
        except (ServerError, asyncio.CancelledError) as error:  # cancelled by `_leave`
            if isinstance(error, ServerError) and error.is_final:
                raise RolloutError(f"{error}; every server would refuse this request") from error
            if request is None or place.usable:  # several requests that fail together count once
                self._set_aside(place)
                place.misses += 1
            place.why = error.cause if isinstance(error, ServerError) else "it did not take the policy's weights"
            if request is not None:
                self._try_again(place, request, hung=isinstance(error.__cause__, TimeoutError))
            return
        if request is None:
            place.usable = found in self._labels
            place.misses = 0 if place.usable else _LOST
            place.restarted = found == STARTED
            if place.usable:
                place.answered_at = time.monotonic()
            if found == self._updating:
                self._set_aside(place)
                place.why = _ON_THEIR_WAY
            elif not place.usable:
                self._leave_out(place, found)
        elif others := {label for answer in found for label, _ in answer.versions}.difference(self._labels):
            self._leave_out(place, min(others))
            self._waiting.appendleft(request)
        else:
            place.failures = place.misses = 0
            place.answered_at = time.monotonic()
            self._outage.end(answered=True)
            self._open.discard(request)
            if request.answer.set_running_or_notify_cancel():
                request.answer.set_result(found)

    def _set_aside(self, place: _Place) -> None:
        """Stop using a server for a while; requests that it already has may still be answered."""
        place.usable = False
        place.aside_until = time.monotonic() + _pause(place.failures)
        place.failures += 1

    def _leave_out(self, place: _Place, label: str) -> None:
        self._set_aside(place)
        place.restarted = label == STARTED
        place.stale = not place.restarted
        cause = "another run uses it" if place.stale else "it was restarted"
        place.why = f"it has weights {label} instead of {self._labels[-1]}: {cause}"

    def _try_again(self, place: _Place, request: _Request, hung: bool) -> None:
        # A late answer is no longer needed.
        self._farewells.add(asyncio.create_task(place.server.end(self._client, [self._name_of(request)])))
        now = time.monotonic()
        if not request.failures:
            request.failing_since = request.begun if hung else now
        if now - max(request.failing_since, self._outage.answered) > self._outage.limit:
            raise self._failure()
        request.not_before, request.last = now + _pause(request.failures), place
        request.failures += 1
        self._waiting.append(request)

    def _give_up(self) -> None:
        """Raise RolloutError if no server could be used for too long, or none will be."""
        if any(place.usable for place in self._places):
            self._outage.end()
        elif all(place.stale for place in self._places):
            raise self._failure()
        elif any(place.failures for place in self._places):  # else their first answers have not arrived yet
            updating = any(place.why == _ON_THEIR_WAY for place in self._places)
            lost = not updating and all(place.misses >= _LOST for place in self._places)
            since = max(place.answered_at for place in self._places)
            if self._outage.left(self._causes if lost else "", since) < 0:
                raise self._failure()

    @property
    def _causes(self) -> str:
        return "; ".join(f"{place.server.url}: {place.why}" for place in self._places)

    def _failure(self) -> RolloutError:
        stale = all(place.stale for place in self._places)
        how_long = "" if stale else f" for {self._outage.limit:.0f} s (sampler.give_up_after)"
        remedy = "give each run its own servers" if stale else "check the servers' logs, and restart them"
        return RolloutError(f"no vLLM server completes{how_long}, with {len(self._open)} requests left: {self._causes}; {remedy}")

    async def _end_all(self) -> None:
        """End all running requests, on the servers as well."""
        running: dict[Server, list[str]] = {}
        for task, (place, request) in self._tasks.items():
            task.cancel()
            if request is not None:
                running.setdefault(place.server, []).append(self._name_of(request))
        self._farewells |= {asyncio.create_task(server.end(self._client, names)) for server, names in running.items()}
        if self._farewells:
            await asyncio.wait(self._farewells, timeout=_FAREWELL_S)
        for farewell in self._farewells:
            farewell.cancel()
        await asyncio.gather(*self._tasks, *self._farewells, return_exceptions=True)

    def _name_of(self, request: _Request) -> str:
        return f"{self._name}-{request.number}-{request.failures}"


def _room(server: Server, samples: int) -> int:
    """Requests that a server may have at once: twice the number that it completes at once.

    With fewer it would wait for us whenever some completions of a prompt end before the others.
    """
    if not server.is_known:
        return 1
    if samples > server.facts.sequences:
        raise ConfigError(
            f"{server.url} completes {server.facts.sequences} sequences at once, fewer than the {samples} samples of a prompt; "
            f"start it with --max-num-seqs {samples} or more"
        )
    return 2 * server.facts.sequences // samples


def _pause(failures: int) -> float:
    return float(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(failures, 16)))
