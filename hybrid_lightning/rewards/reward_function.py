"""`RewardFunction`: base class of rewards. A reward scores completions, and the scores are the training signal."""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

from torch import Tensor

from hybrid_lightning.shared.configurable import Configurable
from hybrid_lightning.types import Prompt


class RewardFunction(Configurable, ABC):
    """Base class of rewards. A subclass needs only `__call__`, which scores completions.

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

    measures_correctness: bool = True  # whether a reward of 1.0 means that the answer is right
    concurrency: int = 1  # completions that may be scored at the same time, if they are scored one by one (see `overlaps`)
    # Share of the completions that may have no value (NaN), as when a judge failed; more stop the run. None: NaN is an error.
    max_failed_share: float | None = None
    failure: str = ""  # why the last failed completion has no value

    _name: str | None = None

    @abstractmethod
    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> Sequence[float] | Tensor:
        """Score completions.

        Args:
            completions: B texts without special tokens. In a rollout they are of type `Completion`, which has `num_tokens` and
                `finished` for rewards that depend on length (see `OverlongPenalty`).
            prompts: The B prompts, one for each completion.

        Returns:
            B finite numbers, in the same order. A reward that measures correctness gives 1.0 for a right answer.
        """

    def overlaps(self, prompt: Prompt) -> int:
        """How many completions may be scored at the same time as they arrive, while others are still being generated.

        Override it in slow rewards, such as programs or calls over HTTP. `__call__` then gets one completion at a time, in
        other threads than training and in any order, and must return the same numbers as for all completions together.

        Returns:
            0 unless overridden: the prompt's completions are scored with all others, after the last one has ended.
        """
        return 0

    def turn_rewards(self, completion: str, prompt: Prompt) -> Sequence[float] | None:
        """The parts of an episode's reward for each turn, for credit by turn (see `rewards_to_go`).

        Returns:
            A number for each turn, from the first on; their sum must be the reward, and missing turns get 0. None: the last turn
            gets the whole reward.
        """
        return None

    def extract_answer(self, completion: str, prompt: Prompt) -> str | None:
        """The answer in a completion, for majority votes (`maj@k`), which count equal answers to a prompt together.

        By default the whole text is the answer. A reward that extracts an answer from the text overrides this, and writes
        equal answers as equal texts.

        Returns:
            The answer; None if the completion has no answer and therefore no vote.
        """
        return completion.strip() or None

    def check_prompt(self, prompt: Prompt) -> None:
        """Check that completions of a prompt can be scored. Called for every prompt before training begins.

        Raises:
            DataError: If they cannot be scored; the message names the row.
        """

    def check_length(self, max_new_tokens: int) -> None:
        """Check that the reward can have an effect on completions of the sampler's length. Called before training begins.

        Args:
            max_new_tokens: Length in tokens at which the sampler cuts completions.

        Raises:
            ConfigError: If it cannot have an effect.
        """

    def decided_by_time(self) -> str | None:
        """Whether the reward also depends on how long something takes, and so on the machine's load.

        Returns:
            Text of a warning at the start of the run, with cause and remedy; None if the reward depends only on its input.
        """
        return None

    def explain(self, completion: str, prompt: Prompt) -> str | None:
        """A human-readable explanation of a scored completion's value; None if there is none."""
        return None

    def anew(self) -> AbstractContextManager[None]:
        """A context in which the reward uses nothing that it keeps from earlier calls, such as a judge's replies.

        `doctor` scores completions a second time in it, to find rewards that are not repeatable.
        """
        return nullcontext()

    def take_counts(self) -> dict[str, float]:
        """Counts of the reward since the last call: name of a metric -> number, the same names at every call.

        Each rollout logs the sums over all terms and processes.
        """
        return {}

    @property
    def name(self) -> str:
        """Name under which the reward is logged: the name given to it, or its class name in snake_case."""
        return self._name or re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(self).__name__).lower()

    def terms(self) -> list[tuple["RewardFunction", float]]:
        """The rewards that add up to this reward, each with its weight; a plain reward has itself as its only term."""
        return [(self, 1.0)]


class DelegatingReward(RewardFunction):
    """Base of rewards that score like other rewards.

    Args:
        scorers: The other rewards: a single one, unless a subclass overrides `scorer` to choose one for each prompt.
    """

    def __init__(self, scorers: Sequence[RewardFunction]) -> None:
        self.scorers = scorers
        self.measures_correctness = scorers[0].measures_correctness
        self.concurrency = max(reward.concurrency for reward in scorers)
        shares = [reward.max_failed_share for reward in scorers if reward.max_failed_share is not None]
        self.max_failed_share = max(shares, default=None)

    def scorer(self, prompt: Prompt) -> RewardFunction:
        """The reward that scores completions of a prompt."""
        return self.scorers[0]

    def seen(self, completion: str) -> str:
        """The part of a completion that the scorer sees."""
        return completion

    def overlaps(self, prompt: Prompt) -> int:
        """How many completions the prompt's scorer may score at the same time (see `RewardFunction.overlaps`)."""
        return self.scorer(prompt).overlaps(prompt)

    def turn_rewards(self, completion: str, prompt: Prompt) -> Sequence[float] | None:
        """The parts of the reward for each turn, from the prompt's scorer."""
        return self.scorer(prompt).turn_rewards(self.seen(completion), prompt)

    def extract_answer(self, completion: str, prompt: Prompt) -> str | None:
        """The answer that the prompt's scorer extracts."""
        return self.scorer(prompt).extract_answer(self.seen(completion), prompt)

    def explain(self, completion: str, prompt: Prompt) -> str | None:
        """The explanation of the prompt's scorer."""
        return self.scorer(prompt).explain(self.seen(completion), prompt)

    @contextmanager
    def anew(self) -> Iterator[None]:
        """The contexts of all scorers."""
        with ExitStack() as stack:
            for reward in self.scorers:
                stack.enter_context(reward.anew())
            yield

    def take_counts(self) -> dict[str, float]:
        """The sums over all scorers."""
        return sum_counts(reward.take_counts() for reward in self.scorers)

    @property
    def failure(self) -> str:  # type: ignore[override]
        """Why the last completion of some scorer has no value."""
        return next((reward.failure for reward in self.scorers if reward.failure), "")

    def check_prompt(self, prompt: Prompt) -> None:
        """Check that the prompt's scorer can score its completions."""
        self.scorer(prompt).check_prompt(prompt)

    def check_length(self, max_new_tokens: int) -> None:
        """Check every scorer."""
        for reward in self.scorers:
            reward.check_length(max_new_tokens)

    def decided_by_time(self) -> str | None:
        """The joined warnings of all scorers; None if there are none."""
        found = [reward.decided_by_time() for reward in self.scorers]
        return "; ".join(dict.fromkeys(text for text in found if text is not None)) or None


def sum_counts(counts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Add up counts by name."""
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)  # type: ignore[arg-type]
    return dict(total)  # type: ignore[arg-type]
