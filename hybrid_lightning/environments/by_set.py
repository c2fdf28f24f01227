"""`EnvironmentBySet`: rows of one run act in environments of their own."""

from collections.abc import Awaitable
from typing import Any, Self

from hybrid_lightning.environments.environment import Answer, Environment, Messages
from hybrid_lightning.errors import ConfigError, DataError
from hybrid_lightning.types import Message, Prompt


class EnvironmentBySet(Environment):
    """Each episode acts in the environment of its prompt's set: one with tools, one that is a game, and so on.

    `Mixture` names sets, and rows of one table name theirs by `set_column`. Prompts show the tools of their own environment.

    Args:
        environments: Name of the set -> its environment.

    Raises:
        ConfigError: If there is no set.
        DataError: If a prompt is of another set.
    """

    def __init__(self, environments: dict[str, Environment]) -> None:
        if not environments:
            raise ConfigError("EnvironmentBySet: environments={}; give each set one, as in environments: {games: GuessNumber}")
        self.environments = environments
        self._own: Any = None  # of the episode

    @property
    def thread_safe(self) -> bool:  # type: ignore[override]
        """Whether the methods of all of them may run in any thread."""
        return all(environment.thread_safe for environment in self.environments.values())

    def prepare(self, chat_template: str | None) -> None:
        """Prepare all of them."""
        super().prepare(chat_template)
        for environment in self.environments.values():
            environment.prepare(chat_template)

    def new(self) -> Self:
        """An object for one episode, which makes an object of its set's environment when it starts."""
        made = type(self)(self.environments)
        made.chat_template = self.chat_template
        return made

    def tools(self) -> list[dict[str, Any]]:
        """The tools of all environments, each once."""
        every = [tool for environment in self.environments.values() for tool in environment.tools()]
        return [tool for place, tool in enumerate(every) if tool not in every[:place]]

    def tools_of(self, prompt: Prompt) -> list[dict[str, Any]]:
        """The tools of the prompt's environment."""
        return self._of(prompt).tools_of(prompt)

    def added_roles(self) -> tuple[str, ...]:
        """The roles of all of them."""
        return tuple(dict.fromkeys(role for environment in self.environments.values() for role in environment.added_roles()))

    def start(self, prompt: Prompt, seed: int) -> Messages | Awaitable[Messages]:
        """Begin the episode in the environment of the prompt's set."""
        self._own = self._of(prompt).new()
        self._own.step_timeout_s, self._own.turn_rewards = self.step_timeout_s, self.turn_rewards
        return self._own.start(prompt, seed)

    def step(self, message: Message) -> Answer | Awaitable[Answer]:
        """What that environment answers."""
        return self._own.step(message)

    def final_reward(self) -> float | Awaitable[float]:
        """What that environment pays at the end."""
        return self._own.final_reward()

    def close(self) -> Awaitable[None] | None:
        """Close that environment, if it was made."""
        return None if self._own is None else self._own.close()

    def _of(self, prompt: Prompt) -> Environment:
        if prompt.set_name not in self.environments:
            raise DataError(
                f"EnvironmentBySet: {prompt.place} is of set {prompt.set_name!r}, which has no environment; there is one for "
                f"{', '.join(self.environments)}; name the sets as the data does, by Mixture or set_column"
            )
        return self.environments[prompt.set_name]
