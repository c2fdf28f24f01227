"""Environments of other packages, used unchanged: each episode makes an object and calls its methods.

    GymEnvironment      reset(seed), step(text) -> observation, reward, terminated, truncated, info    Gymnasium, GEM
    OpenEnvEnvironment  a client: reset(seed), step(action) -> observation, reward, done               OpenEnv

This file imports none of these packages. `make` names a function or class that makes the object, with `arguments`; it also gets
the episode's seed if it has a parameter `seed`. For another API, write a short class: see `examples/agent_frameworks` for
TextArena, SkyRL Gym and TextWorld.
"""

import inspect
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, is_dataclass
from typing import Any, ClassVar

from hybrid_lightning.environments.environment import Environment, Step
from hybrid_lightning.errors import ConfigError, one_line, shorten
from hybrid_lightning.shared.user_code import load_function
from hybrid_lightning.types import Message, Prompt

# Types of the blocks in multimodal messages and MCP results.
_BLOCKS = {"text", "image", "image_url", "audio", "input_audio", "video", "video_url", "resource", "resource_link"}


class ForeignEnvironment(Environment):
    """Base of environments that wrap an object of another package.

    Args:
        make: Function or class that makes the object: `package.module.function` or `path/to/file.py:function`.
        arguments: Its arguments, by name.

    Raises:
        ConfigError: If the function does not exist, or it does not take these arguments.
    """

    def __init__(self, make: str, arguments: dict[str, Any] | None = None) -> None:
        self._function = load_function(make, "make")
        self._arguments = dict(arguments or {})
        self._make = make
        for name in self._arguments:
            if not takes(self._function, name):
                raise ConfigError(f"arguments.{name}: {make} has no parameter {name!r}; correct the name, or leave it out")
        self.game: Any = None  # the object, made when the episode begins

    def _begin(self, seed: int, **more: Any) -> Any:
        """Make the object for an episode."""
        seeded = {"seed": seed} if takes(self._function, "seed", by_name=True) else {}
        self.game = self._function(**{**seeded, **deepcopy(self._arguments), **more})
        return self.game

    def close(self) -> Awaitable[None] | None:
        """Close the object, if it can be closed."""
        closed = self.game.close() if hasattr(self.game, "close") else None
        return closed if inspect.isawaitable(closed) else None


class GymEnvironment(ForeignEnvironment):
    """An environment with Gymnasium's API and texts as observations and actions, such as GEM's.

    The action is the text of the policy's message. `reset` gets the seed if it takes one, and returns an observation, or an
    observation and a dict. `step` returns observation, reward, terminated, truncated and a dict, or as in older Gym versions
    observation, reward, done and a dict. Observations that are not texts are written as JSON.

    Args:
        make: As in `ForeignEnvironment`, such as `gem.make`.
        arguments: Its arguments, such as `{env_id: "game:GuessTheNumber-v0-easy"}`.
    """

    def start(self, prompt: Prompt, seed: int) -> Sequence[Message]:
        """Reset with the seed."""
        game = self._begin(seed)
        answer = game.reset(seed=seed) if takes(game.reset, "seed") else game.reset()
        if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Mapping):
            answer = answer[0]
        return as_messages(answer)

    def step(self, message: Message) -> Step:
        """Act with the text of the message."""
        answer = self.game.step(message["content"])
        if not isinstance(answer, tuple) or len(answer) not in (4, 5) or not isinstance(answer[-1], Mapping):
            raise ConfigError(f"{self._make}: step returned {shorten(answer)}, which does not follow Gymnasium's API; wrap it")
        observation, reward, *over, _ = answer
        return Step(as_messages(observation), reward, any(map(bool, over)))


class OpenEnvEnvironment(ForeignEnvironment):
    """An environment on an OpenEnv server, such as a space on the Hugging Face hub.

    If the server rejects an action as invalid, the policy gets a message, and the action counts in `refused_actions`. If all
    actions are rejected, `action` names the wrong field, or the action needs other fields.

    The server must make the same task for the same seed. Steps of several episodes run at the same time, each in its own session:
    raise the server's `max_concurrent_envs` to at least the number of episodes in a rollout.

    Args:
        url: Address of the server, such as `http://localhost:8000`.
        client: Class of the client; the default supports every environment, with actions and observations as dicts.
        action: Field of the action that receives the text of the policy's message.
        action_class: Class of the actions that `client` expects; None for a dict.
        observation: Field of the observation to show; None for the whole observation, as JSON if it is not text.
        arguments: Further arguments of the client, such as `{message_timeout_s: 30}`.
    """

    thread_safe: ClassVar[bool] = True

    def __init__(
        self,
        url: str,
        client: str = "openenv.core.GenericEnvClient",
        action: str = "message",
        action_class: str | None = None,
        observation: str | None = None,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(client, {"base_url": url, **(arguments or {})})
        self._action, self._observation = action, observation
        self._action_class = load_function(action_class, "action_class") if action_class else dict
        self._over = False

    def start(self, prompt: Prompt, seed: int) -> Sequence[Message]:
        """Open a session, and reset with the seed."""
        client = self._begin(seed)
        self.game = client.sync() if hasattr(client, "sync") else client
        seeded = {"seed": seed} if takes(self.game.reset, "seed") else {}
        return as_messages(self._read(self.game.reset(**seeded)).messages)

    def step(self, message: Message) -> Step:
        """Act with the text of the message."""
        if self._over:  # already over at the start
            return Step(over=True)
        try:
            result = self.game.step(self._action_class(**{self._action: message["content"]}))
        except Exception as error:
            if type(error).__name__ != "ValidationError" and "VALIDATION_ERROR" not in str(error):
                raise
            return Step(as_messages(f"error: the action is not valid: {one_line(error)}"), counts={"refused_actions": 1})
        return self._read(result)

    def _read(self, result: Any) -> Step:
        observation, reward = result.observation, result.reward
        self._over = bool(result.done)
        if self._observation is not None:
            fields = observation if isinstance(observation, Mapping) else _plain(observation)
            if self._observation not in fields:
                raise ConfigError(
                    f"observation={self._observation!r}: the observation of {self._make} has no such field; it has "
                    f"{', '.join(fields) or 'none'}"
                )
            observation = fields[self._observation]
        return Step(as_messages(observation), 0.0 if reward is None else reward, self._over)


def as_messages(observation: Any) -> list[Message]:
    """Turn an observation into messages: none if it is empty, the messages themselves if it is a conversation.

    Example:
        >>> as_messages("higher"), as_messages([{"type": "text", "text": "a board"}]), as_messages(None)
        ([{'role': 'user', 'content': 'higher'}], [{'role': 'user', 'content': 'a board'}], [])
    """
    entries = observation if isinstance(observation, (list, tuple)) else []
    if entries and all(isinstance(entry, Mapping) and {"role", "content"} <= entry.keys() for entry in entries):
        return [{**entry, "content": content_text(entry["content"])} for entry in entries]
    text = content_text(observation)
    return [{"role": "user", "content": text}] if text else []


def content_text(value: Any, fallback: Callable[[Any], str] | None = None) -> str:
    """The text of an observation or of a tool's result, which may consist of blocks, as in multimodal messages and MCP.

    Args:
        value: A text is returned unchanged; None and empty lists give an empty text; data classes, pydantic models, arrays and
            tensors give JSON.
        fallback: Converts values that cannot be written as JSON.

    Raises:
        ConfigError: If a block is not text, or if a value cannot be written as JSON and `fallback` is not given.

    Example:
        >>> content_text({"board": (1, 2)}), content_text({"content": [{"type": "text", "text": "done"}]})
        ('{"board": [1, 2]}', 'done')
    """
    blocks = _plain(value)
    if isinstance(blocks, Mapping) and isinstance(blocks.get("content"), (list, tuple)):
        blocks = blocks["content"]
    blocks = [*map(_plain, blocks)] if isinstance(blocks, (list, tuple)) else []
    if not blocks or not all(isinstance(block, Mapping) and block.get("type") in _BLOCKS for block in blocks):
        return _as_text(value, fallback)
    for block in blocks:
        if block["type"] != "text":
            raise ConfigError(f"there is a block of type {block['type']!r}; only texts can be shown to the policy")
    return "".join(_as_text(block["text"], fallback) for block in blocks)


def _as_text(value: Any, fallback: Callable[[Any], str] | None) -> str:
    if isinstance(value, str):
        return str.__str__(value)
    if value is None or (isinstance(value, (list, tuple, dict)) and not value):
        return ""
    try:
        return json.dumps(value, ensure_ascii=False, default=_plain_or_error)
    except (TypeError, ValueError, RecursionError) as error:
        if fallback is not None:
            return fallback(value)
        raise ConfigError(
            f"observation {shorten(value)} cannot be written as text ({error}); wrap the environment so that its observations "
            "are texts"
        ) from error


def _plain(value: Any) -> Any:
    """Data classes, pydantic models, arrays and tensors as dicts, lists and numbers; anything else unchanged."""
    if hasattr(value, "model_dump"):
        return value.model_dump()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value.tolist() if hasattr(value, "tolist") else value


def _plain_or_error(value: Any) -> Any:
    made = _plain(value)
    if made is value:
        raise TypeError(f"a {type(value).__name__} is not plain data")
    return made


def takes(function: Callable[..., Any], name: str, by_name: bool = False) -> bool:
    """Whether a function has a parameter `name`, or accepts any through `**kwargs` (which counts unless `by_name`)."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # written in C
        return not by_name
    return name in parameters or (not by_name and any(entry.kind is entry.VAR_KEYWORD for entry in parameters.values()))
