"""`EpisodesAhead`: plays episodes of rollouts while the policy trains, each rollout in its own thread."""

import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from dataclasses import replace
from typing import TYPE_CHECKING

from hybrid_lightning.episodes.episodes import Episodes
from hybrid_lightning.errors import RolloutError
from hybrid_lightning.rollout.future import RolloutFuture, in_thread
from hybrid_lightning.rollout.interface import SamplingRequest
from hybrid_lightning.types import Rollout

if TYPE_CHECKING:
    from hybrid_lightning.engine import Engine  # PEFT is slow to import

_END_S = 3.0  # time for a thread to end after a request, unless it hangs


class EpisodesAhead:
    """Plays episodes in threads.

    Each thread has its own tokenizer and its own processes for environments. Of the policy's model, which changes in the
    meantime, it reads only the device and the config. It uses no other object that the process shares.
    """

    def __init__(self, episodes: Episodes) -> None:
        self._episodes = episodes
        self._players: list[_Player] = []

    def begin(
        self, engine: "Engine", request: SamplingRequest, seeds: Sequence[int], on_wait: Callable[[], object] = lambda: None
    ) -> RolloutFuture[Rollout]:
        """Begin to play episodes (see `Episodes.play`). The thread that waits for the result calls `on_wait` now and then."""
        player = next((player for player in self._players if player.work.done()), None)
        if player is None:
            player = _Player(self._episodes)
            self._players.append(player)
        return player.begin(engine, request, seeds, on_wait)

    def shut_down(self) -> None:
        """End the threads, and the processes of their environments."""
        for player in self._players:
            player.ended.set()
        futures.wait([player.work for player in self._players], timeout=_END_S)
        for player in self._players:
            if player.work.done():  # the processes of a busy player end with this process
                player.episodes.shut_down()
        self._players = []


class _Player:
    """Plays in one thread at a time. The thread checks after every token, and while it waits, whether it should end."""

    work: futures.Future[Rollout]

    def __init__(self, episodes: Episodes) -> None:
        self.ended = threading.Event()
        self.episodes = episodes.clone_for_thread(self.check)

    def check(self) -> None:
        """End the thread if its end was requested."""
        if self.ended.is_set():
            raise RolloutError("the episodes were ended")

    def begin(
        self, engine: "Engine", request: SamplingRequest, seeds: Sequence[int], on_wait: Callable[[], object]
    ) -> RolloutFuture[Rollout]:
        """Begin to play."""
        self.ended = threading.Event()
        checked = replace(request, on_token=lambda running, decoded: self.check())
        self.work = work = in_thread(lambda: self.episodes.play(engine, checked, seeds), "episodes ahead")
        return RolloutFuture(work.result, work, on_wait=on_wait, on_cancel=self.ended.set)
