"""Problems of the library reasoning-gym, rebuilt in any process from the columns of `ReasoningGymSource`."""

import json
from functools import lru_cache
from types import ModuleType
from typing import Any

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.types import Prompt


def library(user: str) -> ModuleType:
    """The reasoning-gym module that makes data sets; `user` is the name of the class that needs it.

    Raises:
        ConfigError: If the library is not installed.
    """
    try:
        from reasoning_gym import factory
    except ImportError as error:
        raise ConfigError(f"{user} needs the library reasoning-gym; pip install 'hybrid-lightning[reasoning-gym]'") from error
    return factory  # type: ignore[no-any-return]


def made_again(user: str, prompt: Prompt) -> tuple[Any, dict[str, Any]]:
    """The data set of a prompt's task, which has the verifier, and the prompt's entry; `user` is the calling class.

    Raises:
        ConfigError: If the prompt is not from `ReasoningGymSource`, or if its task is not reproducible.
    """
    try:
        task, config, item = (prompt.columns[name] for name in ("task", "config", "item"))
    except KeyError as error:
        raise ConfigError(f"{user}: {prompt.place} has no column {error}; set data.source=ReasoningGymSource") from error
    found = _entry(user, task, json.dumps(config, sort_keys=True), item)
    if prompt.columns.get("question") not in (None, found[1]["question"]):
        raise ConfigError(
            f"{user}: reasoning-gym task {task!r} is not reproducible: problem {item} differs from {prompt.place}; choose "
            "another task"
        )
    return found


@lru_cache(maxsize=16)
def _dataset(user: str, task: str, config: str) -> Any:
    return library(user).create_dataset(task, **json.loads(config))


@lru_cache(maxsize=1024)
def _entry(user: str, task: str, config: str, item: int) -> tuple[Any, dict[str, Any]]:
    dataset = _dataset(user, task, config)
    return dataset, dataset[item]
