"""`RewardFunction`: the part that says how good a completion is."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from hybrid_lightning.configurable import Configurable
from hybrid_lightning.types import Prompt


class RewardFunction(Configurable, ABC):
    """Scores completions; the training signal.

    A reward of one's own is a class with `__call__`:

    Example:
        >>> class Brevity(RewardFunction):
        ...     measures_correctness = False
        ...     def __init__(self, max_words: int = 20) -> None:
        ...         self.max_words = max_words
        ...     def __call__(self, completions, prompts):
        ...         return [float(len(text.split()) <= self.max_words) for text in completions]
        >>> Brevity(max_words=2)(["two words", "three long words"], [Prompt(text="?"), Prompt(text="?")])
        [1.0, 0.0]
        >>> Brevity().name
        'brevity'
    """

    measures_correctness: bool = True  # whether a full value (1.0) says that the answer is right

    _name: str | None = None

    @abstractmethod
    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> Sequence[float] | Tensor:
        """Score completions.

        Args:
            completions: B texts without special tokens. Those of a rollout are `Completion`, with `num_tokens` and `finished`
                for rewards that depend on length (see `OverlongPenalty`).
            prompts: The prompt of each completion, B as well.

        Returns:
            B finite numbers, in the same order. A reward that measures correctness gives 1.0 to a right answer.
        """

    def extract_answer(self, completion: str, prompt: Prompt) -> str | None:
        """What a completion answers: a majority vote (`maj@k`) counts completions of a prompt with the same answer together.

        A reward that takes an answer out of the text says so here, in a form in which equal answers are equal texts; otherwise
        the whole text is the answer.

        Returns:
            The answer; None where the completion gives none, which then has no vote.
        """
        return completion.strip() or None

    def check_prompt(self, prompt: Prompt) -> None:
        """Make sure that completions of a prompt can be scored; asked of every prompt before training begins.

        Raises:
            DataError: If they cannot; the message names the row.
        """

    def check_length(self, max_new_tokens: int) -> None:
        """Make sure that the reward can do its part where completions are cut; asked before training begins.

        Args:
            max_new_tokens: Longest completion that the sampler makes, in tokens.

        Raises:
            ConfigError: If it cannot.
        """

    def decided_by_time(self) -> str | None:
        """What the reward depends on beside its input: how long something takes, and so on what else the machine does.

        Returns:
            What that is, and the remedy, for a warning when a run starts; None for a reward that only reads.
        """
        return None

    @property
    def name(self) -> str:
        """What the reward is logged as: the name given to it, or its class in snake_case."""
        return self._name or re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(self).__name__).lower()

    def terms(self) -> list[tuple["RewardFunction", float]]:
        """The rewards that this one adds up, each with its weight; a plain reward is its own only term."""
        return [(self, 1.0)]
