"""`RunningEpisode`: one episode with its environment, which starts again after a fault."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from hybrid_lightning.environments.environment import Step
from hybrid_lightning.environments.objects import CLOSE_AGAIN_S, FaultError, LateError, LostError, Objects
from hybrid_lightning.environments.workers import Worker
from hybrid_lightning.errors import HybridLightningError
from hybrid_lightning.types import Message, Prompt

BEGUN_AGAIN = 2  # at most, after faults of the environment


@dataclass(frozen=True)
class Failure:
    """An episode is left out, because its environment failed despite restarts or took too long."""

    reason: str  # one line
    late: bool = False  # whether a call took too long


@dataclass(frozen=True)
class TimedOut:
    """An episode ends because a step exceeded its time limit."""

    reason: str  # one line


Started = tuple[Message, ...] | Failure


class RunningEpisode:
    """An episode. Its methods are awaited in turn; an exception from them is not a fault of the environment, and ends the run.

    Args:
        number: Number of the episode in its rollout.
        prompt: The problem.
        seed: Seed of its group.
        place: Where its environment lives: in this process, or in another.
        step_timeout_s: Longest time of each call in seconds.
    """

    def __init__(self, number: int, prompt: Prompt, seed: int, place: Objects | Worker, step_timeout_s: float) -> None:
        self.close_fault = ""
        self.number, self._prompt, self._seed, self._place, self._step_timeout_s = number, prompt, seed, place, step_timeout_s
        self._started: tuple[Message, ...] | None = None  # messages from `start`; None before
        self._turns: list[tuple[Message, Step]] = []  # messages of the policy, each with its answer
        self._turn = 0  # the current turn; 0: it starts
        self._faults = 0

    async def answer(self, message: Message | None) -> "Started | Step | TimedOut":
        """Start and return the messages after the prompt (`message` None), or pass the policy's message to the environment."""
        while True:
            try:
                if not self._place.has(self.number):
                    await self._begin()
                if message is None:
                    assert self._started is not None
                    return self._started
                step = await self._step(len(self._turns) + 1, message)
                self._turns.append((message, step))
                return step
            except LateError as late:  # not started again, since that would take just as long
                is_new = self._turn > len(self._turns)
                await self.close()
                return TimedOut(str(late)) if is_new else Failure(str(late), late=True)
            except LostError:
                continue
            except FaultError as fault:
                await self.close()
                self._faults += 1
                if self._faults > BEGUN_AGAIN:
                    return Failure(str(fault))

    def forget(self) -> None:
        """Forget the environment, without closing it."""
        self._place.drop(self.number)

    async def final_reward(self) -> float | Failure:
        """The final reward (see `Environment.final_reward`)."""
        try:
            if not self._place.has(self.number):
                await self._begin()
            return await self._call("final_reward")  # type: ignore[no-any-return]
        except LostError:
            return await self.final_reward()
        except FaultError as fault:
            await self.close()
            return Failure(str(fault), late=isinstance(fault, LateError))

    async def close(self) -> None:
        """Close the environment, if there is one. Errors are stored in `close_fault`."""
        try:
            if self._place.has(self.number):
                await self._call("close")
        except (FaultError, HybridLightningError) as fault:
            self.close_fault = "" if isinstance(fault, LostError) else str(fault)
            if isinstance(fault, LateError):
                self._place.close_s = CLOSE_AGAIN_S

    async def _begin(self) -> None:
        """Start an object, and replay the messages that it has already answered."""
        self._turn = 0
        started = await self._call("start", deepcopy(self._prompt), self._seed)  # a group shares the prompt
        if self._started is None:
            self._started = started
        elif started != self._started:
            raise self._differs()
        for turn, (message, before) in enumerate(self._turns, start=1):
            step = await self._step(turn, message)
            if (step.messages, step.reward, step.over) != (before.messages, before.reward, before.over):
                raise self._differs()

    def _differs(self) -> FaultError:
        return FaultError(
            f"{self._place.name} answered differently {self._where()} when it was started again after a fault; derive all its "
            "randomness from the seed"
        )

    async def _step(self, turn: int, message: Message) -> Step:
        self._turn = turn
        return await self._call("step", dict(message))  # type: ignore[no-any-return]  # a copy, since it may change it

    async def _call(self, method: str, *arguments: Any) -> Any:
        timeout_s = min(self._step_timeout_s, self._place.close_s) if method == "close" else self._step_timeout_s
        try:
            return await self._place.call(self.number, method, arguments, timeout_s)
        except FaultError as fault:
            raise type(fault)(f"{fault} {self._where()}") from fault

    def _where(self) -> str:
        turn = f"at turn {self._turn}" if self._turn else "at the start"
        return f"{turn} of {self._prompt.place} (seed {self._seed})"
