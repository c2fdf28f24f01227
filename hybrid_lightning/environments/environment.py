"""`Environment`: the contract of everything that a policy acts in over several turns.

An *episode* is one prompt and a run of turns. In each turn the policy samples a message, and the environment answers with
messages of its own, a reward, and whether the episode is over:

    environment.start(prompt, seed)      messages after the prompt, before the first turn
    environment.step(message)            once a turn
    environment.final_reward()           what it earns besides the rewards of its turns
    environment.close()

There is one object for each episode, made with the arguments of the object in the config. All episodes of a group get the same
seed, and so the same task.
"""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from math import inf
from types import MethodType
from typing import Any, ClassVar, Literal, Self

from hybrid_lightning.configurable import Configurable
from hybrid_lightning.types import Message, Prompt

CUT_MARK = "... [cut]"  # after a text whose end is left out


@dataclass(frozen=True)
class Step:
    """What an environment answers to a message of the policy."""

    messages: Sequence[Message] = ()  # added to the conversation, in order
    reward: float = 0.0  # of this turn
    over: bool = False  # whether the episode ends here; `messages` are then shown, but the policy does not read them
    end: Literal["over", "answered"] = "over"  # why, where it is over: by the environment, or since the policy gave its answer
    counts: Mapping[str, float] = field(default_factory=dict)  # such as {"calls": 2}; logged as means over episodes


Messages = str | Message | Sequence[str | Message] | None  # what `start` may return
Answer = Step | tuple[Messages, float, bool]  # what `step` may return: (messages, reward, over) is short for a `Step`


class Environment(Configurable, ABC):
    """Base class of environments. A subclass needs only `step`.

    Example:
        >>> class Countdown(Environment):
        ...     def start(self, prompt, seed):
        ...         self.left = 3
        ...         return [{"role": "user", "content": "Say go three times."}]
        ...     def step(self, message):
        ...         self.left -= message["content"] == "go"
        ...         over = self.left == 0
        ...         return Step([{"role": "user", "content": f"{self.left} left"}], reward=float(over), over=over)
        >>> countdown = Countdown()
        >>> countdown.start(Prompt(text="Ready?"), seed=0)
        [{'role': 'user', 'content': 'Say go three times.'}]
        >>> countdown.step({"role": "assistant", "content": "go"}).over
        False
    """

    # Episodes run side by side: `async` methods are awaited together, ordinary ones run in threads. Whether these may run in any
    # thread; otherwise each episode has a thread of its own, which what belongs to a thread (SQLite) needs, and `start` runs for
    # one episode at a time, so that what it seeds and draws there repeats itself. All episodes of a process share its global
    # state: what draws from the global generators later, or changes other global state, needs processes (episodes.workers).
    thread_safe: ClassVar[bool] = False

    chat_template: str | None = None  # what `prepare` was given
    # Set before `start`:
    step_timeout_s: float = inf  # seconds for each call, of `EpisodeLimits`
    turn_rewards: bool = False  # whether the reward of each turn counts by itself (model.credit=turn), and not their sum alone

    def start(self, prompt: Prompt, seed: int) -> "Messages | Awaitable[Messages]":
        """Begin the episode. It may be `async`.

        Args:
            prompt: The problem, with its reference answer and columns.
            seed: The same for all episodes of a group, in [0, 2^31): all that is random in the task has to follow from it.

        Returns:
            Messages after those of the prompt, such as the rules of a game; by default none. A text is a message of the user.
        """
        return ()

    @abstractmethod
    def step(self, message: Message) -> "Answer | Awaitable[Answer]":
        """Answer a message of the policy. It may be `async`.

        Args:
            message: `{"role": "assistant", "content": text, "raw": text}`. The content is decoded without special tokens. `raw`,
                for formats that are made of these, has them, except the token that ended the message, and begins with `<think>`
                if the prompt does so.

        Returns:
            A `Step`, or a tuple of its messages, reward and over. A text among the messages is a message of the user. The same
            messages have to get the same answers for the same seed: an episode whose environment has failed is begun again.
        """

    def final_reward(self) -> float | Awaitable[float]:
        """Return what the episode earns at its end, in addition to the rewards of its turns; by default nothing.

        Asked once, whether the environment, the policy or a bound ended the episode, but not after a step that failed or took too
        long. An episode for which it fails is left out. It may be `async`.
        """
        return 0.0

    def close(self) -> Awaitable[None] | None:
        """Free what the episode has used. Called once, also if the episode was cut off."""

    def tools(self) -> list[dict[str, Any]]:
        """JSON schemas of the tools that the policy may call, for the chat template; by default none."""
        return []

    def tools_of(self, prompt: Prompt) -> list[dict[str, Any]]:
        """JSON schemas of the tools for this prompt, where they differ from row to row: some of `tools`, by default all."""
        return self.tools()

    def added_roles(self) -> tuple[str, ...]:
        """Roles of the messages that `step` adds, which are tried with the chat template before a run.

        By default the user's, and a tool's where there are tools.
        """
        return ("tool", "user") if self.tools() else ("user",)

    def prepare(self, chat_template: str | None) -> None:
        """Adapt to the model, once, before any episode begins. A subclass that overrides this calls it, too.

        Args:
            chat_template: Jinja template that renders the conversation; None for a model without one.

        Raises:
            ConfigError: If the environment cannot work with it.
        """
        self.chat_template = chat_template

    def new(self) -> Self:
        """An object for one episode, made with the same arguments and prepared for the same model."""
        made = type(self)(**_copied(self._init_args, {}))
        made.prepare(self.chat_template)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its arguments: another process makes it anew."""
        return partial(type(self), **self._init_args), ()


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    """Nested lists and dicts of a config, copied: an object may change what it was given. Methods get a copy of their object."""
    if isinstance(value, dict):
        return {key: _copied(item, copies) for key, item in value.items()}
    if isinstance(value, MethodType) and not isinstance(value.__self__, type):
        return deepcopy(value, copies)  # one copy for all methods of an object
    return [_copied(item, copies) for item in value] if isinstance(value, list) else value
