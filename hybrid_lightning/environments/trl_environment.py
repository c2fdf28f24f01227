"""`TRLEnvironment`: TRL's environment classes (`environment_factory`), used unchanged."""

import inspect
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, ClassVar

from hybrid_lightning.environments.calls import CallFormat
from hybrid_lightning.environments.environment import Step
from hybrid_lightning.environments.foreign import as_messages, takes
from hybrid_lightning.environments.objects import random_states, restore_random_states
from hybrid_lightning.environments.tool_environment import ToolEnvironment
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.shared.user_calls import call
from hybrid_lightning.shared.user_code import load_function
from hybrid_lightning.types import Message, Prompt


class TRLEnvironment(ToolEnvironment):
    """An environment class of TRL: `reset(**row)` begins an episode, and all its other public methods are tools.

    A row has the columns of the data, `prompt`, `answer` and `seed`; `reset` gets the ones that it takes as parameters. Its
    return value (None, text or blocks of text) is added before the first turn. `get_reward()`, if there is one, is called once,
    at the end of an episode. With `model.credit=turn` it is called after each turn instead, and the reward of a turn is the
    change, so that the rewards of an episode add up to its last value.

    TRL passes no seed, and the episodes of a process share the global random generators. If an environment draws from them, it is
    repeatable, and starts all episodes of a group alike, only with `episodes.workers`. Each episode has its own thread for
    ordinary tools, so several episodes wait at the same time, while TRL calls one tool after another; `reset` runs for one
    episode at a time.

    Args:
        factory: The class, or a function that makes an object: `package.module.Class` or `path/to/file.py:Class`.
        arguments: Its arguments, by name; TRL passes none.
        call_format: As in `ToolEnvironment`.
        tool_timeout_s: As in `ToolEnvironment`; also for `get_reward`.
        max_result_chars: As in `ToolEnvironment`.

    Raises:
        ConfigError: If the class does not exist, it has no `reset` or no tool, or a tool cannot be described to a policy.
    """

    thread_safe: ClassVar[bool] = False  # TRL makes all calls in one thread

    def __init__(
        self,
        factory: str,
        arguments: dict[str, Any] | None = None,
        call_format: CallFormat | None = None,
        tool_timeout_s: float = 30.0,
        max_result_chars: int = 8_000,
    ) -> None:
        before = random_states()  # making the object in the config must not change the run's states
        self._object = load_function(factory, "factory")(**deepcopy(arguments or {}))
        restore_random_states(before)
        # On the class: on the object, properties would be evaluated.
        methods = [name for name, _ in inspect.getmembers(type(self._object), inspect.isfunction) if not name.startswith("_")]
        if "reset" not in methods:
            raise ConfigError(f"factory={factory!r} makes a {type(self._object).__name__}, which has no method reset; add it")
        tools = [getattr(self._object, name) for name in methods if name not in ("reset", "get_reward")]
        if not tools:
            raise ConfigError(
                f"factory={factory!r}: reset is its only public method, so a policy has no tool to call; add a tool"
            )
        super().__init__(tools, call_format, tool_timeout_s, max_result_chars)
        self._get_reward: Callable[[], Any] | None = getattr(self._object, "get_reward", None)
        self._reward = 0.0

    def added_roles(self) -> tuple[str, ...]:
        """See `Environment.added_roles`."""
        return (self._role,)

    def start(self, prompt: Prompt, seed: int) -> Sequence[Message]:
        """Reset with the row."""
        asked = prompt.text if prompt.messages is None else [dict(message) for message in prompt.messages]
        row = {"prompt": asked, "answer": prompt.answer, "seed": seed, **prompt.columns}
        observation = self._object.reset(**{name: value for name, value in row.items() if takes(self._object.reset, name)})
        return [*super().start(prompt, seed), *as_messages(observation)]

    async def step(self, message: Message) -> Step:
        """Run the calls in the policy's message."""
        step = await super().step(message)
        return replace(step, reward=await self._earned()) if self.turn_rewards else step

    async def final_reward(self) -> float:
        """Call `get_reward`, unless each turn has done so."""
        return 0.0 if self.turn_rewards else await self._earned()

    async def _earned(self) -> float:
        """The change of the reward since the last call."""
        if self._get_reward is None:
            return 0.0
        value, error = await call(self._get_reward, self.tool_timeout_s, float)
        if error is not None:
            raise error
        before, self._reward = self._reward, value
        return value - before
