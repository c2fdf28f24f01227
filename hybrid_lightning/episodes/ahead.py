"""`EpisodesAhead`: plays episodes of rollouts that are made while the policy is trained, each rollout in a thread of its own."""

import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hybrid_lightning.episodes.episodes import Episodes
from hybrid_lightning.errors import RolloutError
from hybrid_lightning.rollout.rollout_engine import Begun
from hybrid_lightning.types import Prompt, Rollouts

if TYPE_CHECKING:
    from hybrid_lightning.engine import Engine  # with PEFT, which is slow to import

_SLICE_S = 0.1  # in which the main thread waits, and looks at signals between
_END_S = 3.0  # in which a thread that was told so has ended, unless it hangs


class EpisodesAhead:
    """Plays episodes in threads.

    A thread has its own tokenizer and its own processes for environments. It touches neither the policy's model, which changes
    meanwhile, nor anything else that the process has once.
    """

    def __init__(self, episodes: Episodes) -> None:
        self._episodes = episodes
        self._players: list[_Player] = []

    def begin(
        self, engine: "Engine", prompts: Sequence[Prompt], samples: int, seeds: Sequence[int], **options: Any
    ) -> Begun[Rollouts]:
        """Begin to play episodes (see `Episodes.play`); place and config of the policy's engine are read now."""
        player = next((player for player in self._players if player.made.done()), None)
        if player is None:
            player = _Player(self._episodes)
            self._players.append(player)
        stand_in: Any = SimpleNamespace(model=_Place(engine.model))
        return player.begin(partial(player.episodes.play, stand_in, prompts, samples, seeds, **options))

    def shut_down(self) -> None:
        """End the threads, and the processes of their environments."""
        for player in self._players:
            player.ended.set()
        futures.wait([player.made for player in self._players], timeout=_END_S)
        for player in self._players:
            if player.made.done():  # or its processes end with this one
                player.episodes.shut_down()
        self._players = []


class _Player:
    """One thread at a time, which is only told of a wish to end by what it calls after every token, and while it waits."""

    def __init__(self, episodes: Episodes) -> None:
        self.made: Future[Rollouts] = Future()
        self.ended = threading.Event()
        self.episodes = episodes.clone_for_thread(self.check)

    def check(self) -> None:
        """End the thread if that is wished."""
        if self.ended.is_set():
            raise RolloutError("the episodes were ended")

    def begin(self, play: Callable[..., Rollouts]) -> Begun[Rollouts]:
        """Begin to play."""
        made = self.made = Future()
        ended = self.ended = threading.Event()

        def work() -> None:
            try:
                made.set_result(play(on_token=lambda running, decoded: self.check()))
            except BaseException as error:
                made.set_exception(error)

        def wait() -> None:
            while not made.done():
                futures.wait([made], timeout=_SLICE_S)

        threading.Thread(target=work, daemon=True, name="episodes ahead").start()
        return Begun(made.result, wait, ended.set)


class _Place(nn.Module):
    """What an engine that completes elsewhere has to know of the policy's model: its config, and where it is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.config = getattr(model, "config", None)
        self.place = nn.Parameter(torch.empty(0, device=next(model.parameters()).device), requires_grad=False)
