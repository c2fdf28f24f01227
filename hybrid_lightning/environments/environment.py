"""`Environment`: base class of anything that a policy acts in over several turns.

An *episode* is one prompt and a sequence of turns. In each turn the policy samples a message, and the environment answers with
messages, a reward, and whether the episode is over:

    environment.start(prompt, seed)      messages after the prompt, before the first turn
    environment.step(message)            once per turn
    environment.final_reward()           the reward at the end, added to the rewards of the turns
    environment.close()

Each episode has its own object, made with the arguments of the object in the config. All episodes of a group get the same seed
and therefore the same task.
"""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from math import inf
from types import MethodType
from typing import Any, ClassVar, Literal, Self

from hybrid_lightning.shared.configurable import Configurable
from hybrid_lightning.types import Message, Prompt

CUT_MARK = "... [cut]"  # after a truncated text


@dataclass(frozen=True)
class Step:
    """An environment's answer to a message of the policy."""

    messages: Sequence[Message] = ()  # added to the conversation, in order
    reward: float = 0.0  # for this turn
    over: bool = False  # whether the episode ends here; `messages` are then shown, but the policy does not read them
    end: Literal["over", "answered"] = "over"  # why it is over: the environment ended it, or the policy gave its answer
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

    # Whether ordinary methods may run in any thread. Episodes run concurrently: `async` methods are awaited together, ordinary
    # methods run in threads. If False, each episode has its own thread, for objects that belong to a thread (SQLite), and `start`
    # runs for one episode at a time, so that seeding and drawing there is repeatable. All episodes of a process share its global
    # state: code that draws from the global generators later, or changes other global state, needs processes (episodes.workers).
    thread_safe: ClassVar[bool] = False

    chat_template: str | None = None  # the argument of `prepare`
    # Set before `start`:
    step_timeout_s: float = inf  # time limit for each call, from `EpisodeLimits`
    turn_rewards: bool = False  # whether the reward of each turn counts by itself (model.credit=turn), not only their sum

    def start(self, prompt: Prompt, seed: int) -> "Messages | Awaitable[Messages]":
        """Begin the episode. It may be `async`.

        Args:
            prompt: The problem, with its reference answer and columns.
            seed: The same for all episodes of a group, in [0, 2^31). All randomness of the task must follow from it.

        Returns:
            Messages to add after the prompt, such as the rules of a game; by default none. A plain text is a user message.
        """
        return ()

    @abstractmethod
    def step(self, message: Message) -> "Answer | Awaitable[Answer]":
        """Answer a message of the policy. It may be `async`.

        Args:
            message: `{"role": "assistant", "content": text, "raw": text}`. The content is decoded without special tokens. `raw`
                has them, for formats that consist of special tokens, except the token that ended the message. It begins with
                `<think>` if the prompt does.

        Returns:
            A `Step`, or a tuple of its messages, reward and over. A plain text among the messages is a user message. With the
            same seed, the same messages must get the same answers: after a fault, the episode is replayed.
        """

    def final_reward(self) -> float | Awaitable[float]:
        """Return the reward at the end of the episode, in addition to the rewards of its turns; by default 0.

        Called once, whether the environment, the policy or a limit ended the episode, but not after a step that failed or took
        too long. If the call fails, the episode is left out. It may be `async`.
        """
        return 0.0

    def close(self) -> Awaitable[None] | None:
        """Free the episode's resources. Called once, even if the episode was cut off."""

    def tools(self) -> list[dict[str, Any]]:
        """JSON schemas of the tools that the policy may call, for the chat template; by default none."""
        return []

    def tools_of(self, prompt: Prompt) -> list[dict[str, Any]]:
        """JSON schemas of the tools for this prompt, a subset of `tools`; by default all."""
        return self.tools()

    def added_roles(self) -> tuple[str, ...]:
        """Roles of the messages that `step` adds, which are tested with the chat template before a run.

        By default user, and tool if there are tools.
        """
        return ("tool", "user") if self.tools() else ("user",)

    def prepare(self, chat_template: str | None) -> None:
        """Adapt to the model. Called once, before any episode begins. An override must call this method.

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
        """Pickled as its arguments, from which another process makes its own object."""
        return partial(type(self), **self._init_args), ()


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    """Copy nested lists and dicts of a config, since an object may change them. A method is bound to a copy of its object."""
    if isinstance(value, dict):
        return {key: _copied(item, copies) for key, item in value.items()}
    if isinstance(value, MethodType) and not isinstance(value.__self__, type):
        return deepcopy(value, copies)  # one copy for all methods of an object
    return [_copied(item, copies) for item in value] if isinstance(value, list) else value
