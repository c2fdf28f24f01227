"""`EpisodesAhead`: plays episodes of rollouts while the policy trains, each rollout in its own thread."""

import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hybrid_lightning.episodes.episodes import Episodes
from hybrid_lightning.errors import RolloutError
from hybrid_lightning.rollout.future import RolloutFuture, in_thread
from hybrid_lightning.rollout.interface import SamplingRequest
from hybrid_lightning.types import Rollouts

if TYPE_CHECKING:
    from hybrid_lightning.engine import Engine  # PEFT is slow to import

_END_S = 3.0  # time for a thread to end after a request, unless it hangs


class EpisodesAhead:
    """Plays episodes in threads.

    Each thread has its own tokenizer and its own processes for environments. It uses neither the policy's model, which changes in
    the meantime, nor any other object that the process shares.
    """

    def __init__(self, episodes: Episodes) -> None:
        self._episodes = episodes
        self._players: list[_Player] = []

    def begin(
        self,
        engine: "Engine",
        request: SamplingRequest,
        seeds: Sequence[int],
        on_wait: Callable[[], object] = lambda: None,
    ) -> RolloutFuture[Rollouts]:
        """Begin to play episodes (see `Episodes.play`). Reads the device and the config of the policy's engine now.

        The thread that waits for the result calls `on_wait` from time to time.
        """
        player = next((player for player in self._players if player.is_free), None)
        if player is None:
            player = _Player(self._episodes)
            self._players.append(player)
        stand_in: Any = SimpleNamespace(model=_Place(engine.model))
        return player.begin(stand_in, request, seeds, on_wait)

    def shut_down(self) -> None:
        """End the threads, and the processes of their environments."""
        for player in self._players:
            player.ended.set()
        futures.wait([player.work for player in self._players if player.work is not None], timeout=_END_S)
        for player in self._players:
            if player.is_free:  # the processes of a busy player end with this process
                player.episodes.shut_down()
        self._players = []


class _Player:
    """Plays in one thread at a time. The thread checks after every token, and while it waits, whether it should end."""

    def __init__(self, episodes: Episodes) -> None:
        self.work: Future[Rollouts] | None = None
        self.ended = threading.Event()
        self.episodes = episodes.clone_for_thread(self.check)

    @property
    def is_free(self) -> bool:
        """Whether no episodes are being played."""
        return self.work is None or self.work.done()

    def check(self) -> None:
        """End the thread if its end was requested."""
        if self.ended.is_set():
            raise RolloutError("the episodes were ended")

    def begin(
        self, engine: "Engine", request: SamplingRequest, seeds: Sequence[int], on_wait: Callable[[], object]
    ) -> RolloutFuture[Rollouts]:
        """Begin to play."""
        self.ended = threading.Event()
        checked = replace(request, on_token=lambda running, decoded: self.check())
        self.work = work = in_thread(lambda: self.episodes.play(engine, checked, seeds), "episodes ahead")
        return RolloutFuture(work.result, work, on_wait=on_wait, on_cancel=self.ended.set)


class _Place(nn.Module):
    """What an engine in another process needs from the policy's model: its config and its device."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.config = getattr(model, "config", None)
        self.place = nn.Parameter(torch.empty(0, device=next(model.parameters()).device), requires_grad=False)
