"""Episodes in rounds and at once: what is sampled together, what holds up what, and how they end."""

import asyncio
import gc
import threading
import time
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import pytest

from hybrid_lightning.errors import RolloutError
from hybrid_lightning.rollout.interface import MessageRequest, Sampled
from hybrid_lightning.rollout.playing import Alone, AtOnce, Rounds, Surroundings
from hybrid_lightning.types import Completion


def message(request):
    return Sampled([request.episode, request.number], [0.0, 0.0], [], Completion("x", 2, True))


@dataclass
class Asks:
    """Asks some times, and waits before each time but the first; `blocks` blocks the event loop instead."""

    number: int
    times: int = 2
    waits_s: float = 0.0
    blocks: threading.Event | None = None
    raises: bool = False
    heard: list = field(default_factory=list)
    moved: list = field(default_factory=list)

    async def play(self, ask):
        while len(self.heard) < self.times:
            if self.heard and self.blocks is not None:
                self.blocks.wait(60)
            if self.heard:
                await asyncio.sleep(self.waits_s)
            if self.heard and self.raises:
                raise ValueError("the board is gone")
            found = await ask(MessageRequest(self.number, len(self.heard), [], 4))
            self.heard.append(found.ids)

    def relocated(self):
        other = replace(self, heard=list(self.heard), blocks=None)
        self.moved.append(other)
        return other


def play_in_rounds(episodes, sample, around=None):
    messages = []
    with Rounds(episodes, around or Surroundings()) as rounds:
        while asked := rounds.advance(messages):
            messages = sample(asked)


def test_a_round_has_the_requests_of_all_live_episodes_in_their_order():
    rounds = []
    episodes = [Asks(0, 1), Asks(1, 3, waits_s=0.05), Asks(2, 2, waits_s=0.01), Asks(3, 3)]

    def sample(requests):
        assert threading.current_thread() is threading.main_thread()
        rounds.append([(request.episode, request.number) for request in requests])
        return list(map(message, requests))

    play_in_rounds(episodes, sample)
    assert rounds == [[(0, 0), (1, 0), (2, 0), (3, 0)], [(1, 1), (2, 1), (3, 1)], [(1, 2), (3, 2)]]
    assert [len(episode.heard) for episode in episodes] == [1, 3, 2, 3]


@pytest.mark.parametrize("fails", [False, True])
def test_without_environments_the_calling_thread_plays_and_ends_all_of_them(fails):
    heard, ended, rounds, messages = [], [], [], []

    class Waits:
        def __init__(self, number):
            self.number = number

        async def play(self, ask):
            try:
                for turn in range(1 + self.number):
                    assert threading.current_thread() is threading.main_thread()
                    heard.append((await ask(MessageRequest(self.number, turn, [], 4))).ids)
                    assert not (fails and turn == 1), "the board is gone"
            finally:
                ended.append(self.number)

    with (
        pytest.raises(AssertionError, match="the board is gone") if fails else nullcontext(),
        Alone([*map(Waits, range(3))]) as all_,
    ):
        while asked := all_.advance(messages):
            rounds.append([(request.episode, request.number) for request in asked])
            messages = list(map(message, asked))
    assert rounds == [[(0, 0), (1, 0), (2, 0)], [(1, 1), (2, 1)], [(2, 2)]][: 2 if fails else 3]
    assert [tuple(ids) for ids in heard] == [place for of_round in rounds for place in of_round][: 4 if fails else None]
    assert sorted(ended) == [0, 1, 2]


def finished(log):
    async def finish():
        log.append("finished")

    return finish


@pytest.mark.parametrize("fails", ["episode", "sampling"])
def test_the_first_failure_ends_all_episodes_and_what_surrounds_them(fails):
    log, episodes = [], [Asks(0, raises=fails == "episode"), Asks(1, waits_s=60)]

    def sample(requests):
        if fails == "sampling":
            raise ValueError("the board is gone")
        return list(map(message, requests))

    began = time.monotonic()
    with pytest.raises(ValueError, match="the board is gone"):
        play_in_rounds(episodes, sample, Surroundings(finish=finished(log)))
    assert log == ["finished"] and time.monotonic() - began < 30


def test_episodes_go_on_elsewhere_where_they_waited_after_code_has_blocked_the_event_loop():
    free = threading.Event()
    episodes = [Asks(0, 3), Asks(1, 3, blocks=free), Asks(2, 3)]
    play_in_rounds(episodes, lambda requests: list(map(message, requests)), Surroundings(blocked_s=0.3))
    free.set()
    ends = [episode.moved[-1] for episode in episodes]
    assert [episode.heard for episode in ends] == [[[number, turn] for turn in range(3)] for number in range(3)]


def at_once(episodes, log, **surroundings):
    asked = []

    async def ask(request):
        asked.append((request.episode, request.number))
        return await asyncio.wrap_future(answered(request))

    def answered(request):
        answer = Future()
        answer.set_result(message(request))
        return answer

    around = Surroundings(finish=finished(log), **surroundings)
    return AtOnce(episodes, ask, around, lambda: log.append("ended")), asked


def test_a_slow_episode_holds_up_itself_alone_and_nobody_waits_for_the_caller():
    log, free = [], threading.Event()
    playing, asked = at_once([Asks(0, 4), Asks(1, 2, waits_s=1.0), Asks(2, 3)], log)
    begun, live = playing.begin(lambda count: live.append(count)), []
    until = time.monotonic() + 30
    while len(asked) < 8 and time.monotonic() < until:
        time.sleep(0.01)
    assert asked.count((1, 1)) == 0 and not begun.done() and not free.is_set()
    begun.result()
    assert len(asked) == 9 and log == ["finished", "ended"] and live[-1] == 0 and 1 in live


def test_episodes_that_nobody_needs_any_more_end_although_they_wait():
    log = []
    playing, _ = at_once([Asks(0, 2, waits_s=600), Asks(1, 1)], log)
    begun, began = playing.begin(), time.monotonic()
    begun.cancel()
    with pytest.raises(RolloutError, match="was cancelled"):
        begun.result()
    until = time.monotonic() + 30
    while len(log) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert log == ["finished", "ended"] and time.monotonic() - began < 30


def test_what_waits_for_an_engine_elsewhere_notices_a_blocked_event_loop_too():
    """What is left on the blocked one and is thrown away meanwhile changes nothing for episodes that continue elsewhere."""
    log, free = [], threading.Event()
    episodes = [Asks(0, 3, waits_s=0.5), Asks(1, 2, waits_s=1.0, blocks=free)]
    at_once(episodes, log, blocked_s=0.3)[0].begin(lambda live: gc.collect()).result()
    free.set()
    assert log == ["finished", "ended"]
    assert [len(episode.moved[-1].heard) for episode in episodes] == [3, 2]
