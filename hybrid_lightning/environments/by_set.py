"""`EnvironmentBySet`: each set of the data has its own environment."""

from collections.abc import Awaitable
from typing import Any, Self

from hybrid_lightning.environments.environment import Answer, Environment, Messages
from hybrid_lightning.errors import ConfigError, DataError
from hybrid_lightning.types import Message, Prompt


class EnvironmentBySet(Environment):
    """Each episode acts in the environment of its prompt's set, such as tools for one set and a game for another.

    Sets get their names from `Mixture`, or from the `set_column` of a table. A prompt shows the tools of its own environment.

    Args:
        environments: Name of the set -> its environment.

    Raises:
        ConfigError: If no set is given.
        DataError: If a prompt belongs to another set.
    """

    def __init__(self, environments: dict[str, Environment]) -> None:
        if not environments:
            raise ConfigError("EnvironmentBySet: environments={}; give each set one, as in environments: {games: GuessNumber}")
        self.environments = environments
        self._own: Any = None  # of the episode

    @property
    def thread_safe(self) -> bool:  # type: ignore[override]
        """Whether the methods of all environments may run in any thread."""
        return all(environment.thread_safe for environment in self.environments.values())

    def prepare(self, chat_template: str | None) -> None:
        """Prepare all environments."""
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
        """The roles of all environments."""
        return tuple(dict.fromkeys(role for environment in self.environments.values() for role in environment.added_roles()))

    def start(self, prompt: Prompt, seed: int) -> Messages | Awaitable[Messages]:
        """Begin the episode in the environment of the prompt's set."""
        self._own = self._of(prompt).new()
        self._own.step_timeout_s, self._own.turn_rewards = self.step_timeout_s, self.turn_rewards
        return self._own.start(prompt, seed)

    def step(self, message: Message) -> Answer | Awaitable[Answer]:
        """Answer with that environment."""
        return self._own.step(message)

    def final_reward(self) -> float | Awaitable[float]:
        """The final reward of that environment."""
        return self._own.final_reward()

    def close(self) -> Awaitable[None] | None:
        """Close that environment, if it was made."""
        return None if self._own is None else self._own.close()

    def _of(self, prompt: Prompt) -> Environment:
        if prompt.set_name not in self.environments:
            raise DataError(
                f"EnvironmentBySet: {prompt.place} belongs to set {prompt.set_name!r}, which has no environment; the sets with "
                f"an environment are {', '.join(self.environments)}; use the set names of the data (Mixture or set_column)"
            )
        return self.environments[prompt.set_name]
