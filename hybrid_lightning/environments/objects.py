"""`Objects`: the environments of one process, one object per episode, and the calls of their methods."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from hybrid_lightning.environments.answers import OddAnswerError, checked_messages, checked_reward, checked_step
from hybrid_lightning.environments.environment import Environment
from hybrid_lightning.errors import ConfigError, HybridLightningError
from hybrid_lightning.shared.user_calls import CallThreads, TookTooLongError, call
from hybrid_lightning.shared.user_code import describe_error

CLOSE_S, CLOSE_AGAIN_S = 10.0, 0.1  # time limit of `close`, and after a `close` that took longer
_CHECKS: dict[str, Callable[[Any], Any]] = {"start": checked_messages, "step": checked_step, "final_reward": checked_reward}


class FaultError(Exception):
    """A fault of an environment, on one line, such as "Game.step raised ValueError: no board"."""


class LateError(FaultError):
    """A call of an environment took too long."""


class LostError(FaultError):
    """The object was lost with its process; the episode is not at fault."""


class Objects:
    """The environments of this process. Calls are awaited on the event loop of `user_calls`.

    Args:
        environment: The object of the config.
        step_timeout_s: Passed to each object.
        turn_rewards: Passed to each object.
    """

    def __init__(self, environment: Environment, step_timeout_s: float, turn_rewards: bool) -> None:
        self.name, self.close_s = type(environment).__name__, CLOSE_S
        self._environment, self._step_timeout_s, self._turn_rewards = environment, step_timeout_s, turn_rewards
        self._objects: dict[int, Environment] = {}
        self._threads: dict[int, CallThreads] = {}  # each object's own thread, unless the class is `thread_safe`

    def has(self, number: int) -> bool:
        """Whether there is an object for an episode."""
        return number in self._objects

    def drop(self, number: int) -> None:
        """Forget the object of an episode."""
        self._objects.pop(number, None)
        if number in self._threads:
            self._threads.pop(number).close()

    async def call(self, number: int, method: str, arguments: tuple[Any, ...], timeout_s: float | None) -> Any:
        """Call a method of an episode's object; "start" makes the object.

        Returns:
            The checked answer.

        Raises:
            FaultError: If the call raises or returns a malformed answer; LateError if it takes too long.
            HybridLightningError: If the environment raises one, such as a mistake in the config; this does not count as a fault.
        """
        made: list[Environment] = []

        def start() -> Any:
            made.append(self._new())
            return made[0].start(*arguments)

        if method == "close" and number not in self._objects:  # making it failed
            return None
        function = start if method == "start" else partial(getattr(self._objects[number], method), *arguments)
        check = _CHECKS.get(method, lambda value: value)
        threads = None if self._environment.thread_safe else self._threads.setdefault(number, CallThreads())
        value, error = await call(function, timeout_s, check, threads, alone=threads is not None and method == "start")
        if made:
            self._objects[number] = made[0]
        if method == "close":
            self.drop(number)
        if isinstance(error, HybridLightningError):
            raise error
        if isinstance(error, TookTooLongError):
            raise LateError(late_message(self.name, method, timeout_s))
        if isinstance(error, OddAnswerError):
            raise FaultError(f"{self.name}.{method} {error};")
        if error is not None:
            raise FaultError(f"{self.name}.{method} raised {describe_error(error)}") from error
        return value

    def _new(self) -> Environment:
        environment = self._environment.new()
        if environment is self._environment:
            raise ConfigError(
                f"{self.name}.new returns the same object for all episodes, which would share its state; return a new object"
            )
        environment.step_timeout_s, environment.turn_rewards = self._step_timeout_s, self._turn_rewards
        return environment


def late_message(name: str, method: str, timeout_s: float | None) -> str:
    """Message about a call that took too long."""
    return f"{name}.{method} took more than {'' if method in ('close', 'import') else 'episodes.step_timeout_s='}{timeout_s:g} s"


def random_states() -> tuple[Any, Any, torch.Tensor]:
    """The states of the global generators of Python, NumPy and torch (of the CPU)."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def same_random_states(one: tuple[Any, Any, torch.Tensor], other: tuple[Any, Any, torch.Tensor]) -> bool:
    """Whether the generators would continue in the same way."""
    numpy = all(np.array_equal(*pair) for pair in zip(one[1], other[1], strict=True))
    return one[0] == other[0] and numpy and torch.equal(one[2], other[2])


def restore_random_states(states: tuple[Any, Any, torch.Tensor]) -> None:
    """Set the global generators to these states."""
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
