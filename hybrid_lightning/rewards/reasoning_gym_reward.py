"""`ReasoningGymReward`: the verifier of a reasoning-gym task as a reward."""

import json
import logging
from copy import deepcopy
from functools import lru_cache
from typing import Any

from hybrid_lightning.errors import ConfigError, RewardError
from hybrid_lightning.rewards.evaluate import name_completion
from hybrid_lightning.rewards.text import AnswerReward, extract_match
from hybrid_lightning.types import Prompt
from hybrid_lightning.user_code import describe_error

logger = logging.getLogger(__name__)


class ReasoningGymReward(AnswerReward):
    r"""The score of the task's own verifier, from 0.0 to 1.0. Many give partial credit, and some accept numbers that are close.

    A completion on which the verifier raises an exception earns 0, with a warning.

    Only for prompts of `ReasoningGymSource`: from their columns `task`, `config` and `item` the problem is made again, with
    everything that the verifier needs.

    Args:
        pattern: Regular expression with one group, which is the answer, such as `<answer>(.*?)</answer>`. The last match counts,
            and no match earns 0. None takes the whole completion, without white space around it.
        name: Name under which it is logged; None for `reasoning_gym_reward`.
    """

    def __init__(self, pattern: str | None = None, name: str | None = None) -> None:
        super().__init__(pattern, name)
        self._checked: set[tuple[str, str]] = set()

    def extract_answer(self, completion: str, prompt: Prompt) -> str | None:
        """The text that the verifier gets."""
        answer = extract_match(self.pattern, completion)
        return None if answer is None else answer.strip() or None

    def check_prompt(self, prompt: Prompt) -> None:
        """Check, at the first prompt of each task, that its problem can be made again, and that not every text is right.

        Raises:
            RewardError: If the problem cannot be made again, or the verifier accepts any text.
        """
        recipe = str(prompt.columns.get("task")), json.dumps(prompt.columns.get("config"), sort_keys=True)
        if recipe in self._checked:  # a problem can take a second to make
            return
        self._problem(prompt)
        if _takes_everything(*recipe):
            raise RewardError(
                f"ReasoningGymReward: the verifier of reasoning-gym task {recipe[0]!r} takes any text for right; choose another "
                "task, or a newer reasoning-gym"
            )
        self._checked.add(recipe)

    def score(self, completion: str, prompt: Prompt) -> float:
        """Ask the verifier."""
        answer = self.extract_answer(completion, prompt)
        dataset, entry = self._problem(prompt)
        if answer is None:
            return 0.0
        try:
            value = float(dataset.score_answer(answer, deepcopy(entry)))
        except Exception as error:  # verifiers do not expect answers of another form
            logger.warning(
                "reasoning-gym's verifier raised %s %s; it earns nothing",
                describe_error(error),
                name_completion(completion, prompt),
            )
            return 0.0
        return min(value, 1.0)

    def _problem(self, prompt: Prompt) -> tuple[Any, dict[str, Any]]:
        try:
            task, config, item = (prompt.columns[column] for column in ("task", "config", "item"))
            question = prompt.columns["question"]
        except KeyError as error:
            raise RewardError(
                f"ReasoningGymReward: {prompt.place} has no column {error}; take ReasoningGymSource as data.source"
            ) from error
        dataset, entry = _entry(task, json.dumps(config, sort_keys=True), item)
        if entry["question"] != question:
            raise RewardError(
                f"ReasoningGymReward: reasoning-gym task {task!r} made another problem {item} than for {prompt.source} row "
                f"{prompt.index}, so that it is not reproducible; choose another task"
            )
        return dataset, entry


@lru_cache(maxsize=16)
def _dataset(task: str, config: str) -> Any:
    try:
        from reasoning_gym.factory import create_dataset
    except ImportError as error:
        raise ConfigError(
            "ReasoningGymReward needs the library reasoning-gym; install the optional extra: "
            "pip install 'hybrid-lightning[reasoning-gym]'"
        ) from error
    return create_dataset(task, **json.loads(config))


@lru_cache(maxsize=1024)
def _entry(task: str, config: str, item: int) -> tuple[Any, dict[str, Any]]:
    dataset = _dataset(task, config)
    return dataset, dataset[item]


@lru_cache(maxsize=64)
def _takes_everything(task: str, config: str) -> bool:
    """Whether two texts that cannot be an answer earn 1.0 on the first problems of a task."""
    dataset = _dataset(task, config)
    try:
        scores = [dataset.score_answer(text, dataset[item]) for item in range(min(2, len(dataset))) for text in ("\u2603", "?!")]
    except Exception:
        return False  # it does not accept these texts
    return min(scores) >= 1.0
