"""`ReasoningGymReward`: the verifier of a reasoning-gym task as a reward."""

import json
import logging
from copy import deepcopy
from typing import Any

from hybrid_lightning.errors import RewardError
from hybrid_lightning.rewards.terms import name_completion
from hybrid_lightning.rewards.text import AnswerReward
from hybrid_lightning.shared.reasoning_gym_tasks import made_again
from hybrid_lightning.shared.user_code import describe_error
from hybrid_lightning.types import Prompt

logger = logging.getLogger(__name__)


class ReasoningGymReward(AnswerReward):
    r"""The score of the task's own verifier, from 0.0 to 1.0. Many give partial credit, and some accept close numbers.

    If the verifier raises an exception, the completion earns 0, with a warning.

    Use it only for prompts of `ReasoningGymSource`: the problem, with everything that the verifier needs, is rebuilt from their
    columns `task`, `config` and `item`.

    Args:
        pattern: Regular expression with one group for the answer, such as `<answer>(.*?)</answer>`. The last match counts,
            and no match earns 0. None takes the whole completion, without white space around it.
        name: Name in logs; None for `reasoning_gym_reward`.
    """

    def __init__(self, pattern: str | None = None, name: str | None = None) -> None:
        super().__init__(pattern, name)
        self._checked: set[tuple[str, str]] = set()

    def check_prompt(self, prompt: Prompt) -> None:
        """Check, at the first prompt of each task, that its problem can be rebuilt, and that its verifier rejects wrong texts.

        Raises:
            ConfigError: If the problem cannot be rebuilt.
            RewardError: If the verifier accepts any text.
        """
        recipe = str(prompt.columns.get("task")), json.dumps(prompt.columns.get("config"), sort_keys=True)
        if recipe in self._checked:  # a problem can take a second to make
            return
        if _takes_everything(made_again(type(self).__name__, prompt)[0]):
            raise RewardError(
                f"ReasoningGymReward: the verifier of reasoning-gym task {recipe[0]!r} accepts any text; choose another task, or "
                "a newer reasoning-gym"
            )
        self._checked.add(recipe)

    def score(self, completion: str, prompt: Prompt) -> float:
        """Run the verifier."""
        answer = self.extract_answer(completion, prompt)
        dataset, entry = made_again(type(self).__name__, prompt)
        if answer is None:
            return 0.0
        try:
            value = float(dataset.score_answer(answer, deepcopy(entry)))
        except Exception as error:  # verifiers do not expect answers of a different form
            where = name_completion(completion, prompt)
            logger.warning("reasoning-gym's verifier raised %s %s; it earns nothing", describe_error(error), where)
            return 0.0
        return min(value, 1.0)


def _takes_everything(dataset: Any) -> bool:
    """Whether two nonsense texts earn 1.0 on the first problems of a task."""
    try:
        scores = [dataset.score_answer(text, dataset[item]) for item in range(min(2, len(dataset))) for text in ("\u2603", "?!")]
    except Exception:
        return False  # it does not accept these texts
    return min(scores) >= 1.0
