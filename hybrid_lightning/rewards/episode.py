"""Rewards of episodes: what the environment gave, and other rewards of the last message alone.

Any reward can score episodes. A completion's text is all that the policy said, and nothing that an environment or a tool added;
`completion.episode` has the conversation by roles, how it ended, and what was counted.
"""

from collections.abc import Sequence

from torch import Tensor

from hybrid_lightning.errors import RewardError
from hybrid_lightning.rewards.reward_function import RewardFunction
from hybrid_lightning.types import Completion, Episode, Prompt


class EpisodeReturn(RewardFunction):
    """The sum of the rewards that the environment gave in the turns of an episode; an episode with a return of 1 is solved.

    Example:
        >>> episode = Episode(messages=(), turns=2, end="over", rewards=(0.25, 0.75))
        >>> EpisodeReturn()([Completion("4\\n5", 4, True, episode=episode)], [Prompt(text="Guess")])
        [1.0]
    """

    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[float]:
        """Add up what the environment gave.

        Raises:
            RewardError: If a completion is none of an episode.
        """
        return [float(sum(_episode(completion).rewards)) for completion in completions]


class FinalAnswer(RewardFunction):
    """Scores the last message of an episode alone, as if it were the whole completion; its tokens are those of the episode.

    Args:
        reward: Scores that message.
    """

    def __init__(self, reward: RewardFunction) -> None:
        self.reward = reward
        self.measures_correctness = reward.measures_correctness

    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> Sequence[float] | Tensor:
        """Score the last messages.

        Raises:
            RewardError: If a completion is none of an episode.
        """
        return self.reward([_last(completion) for completion in completions], prompts)

    def extract_answer(self, completion: str, prompt: Prompt) -> str | None:
        """The answer that the last message gives."""
        return self.reward.extract_answer(_last(completion), prompt)

    def check_prompt(self, prompt: Prompt) -> None:
        """See the reward."""
        self.reward.check_prompt(prompt)

    def check_length(self, max_new_tokens: int) -> None:
        """See the reward."""
        self.reward.check_length(max_new_tokens)

    def decided_by_time(self) -> str | None:
        """See the reward."""
        return self.reward.decided_by_time()

    @property
    def name(self) -> str:
        """That of the reward."""
        return self.reward.name

    def terms(self) -> list[tuple[RewardFunction, float]]:
        """The terms of the reward, each of the last message."""
        own = self.reward.terms()
        return [(self, 1.0)] if own == [(self.reward, 1.0)] else [(FinalAnswer(term), weight) for term, weight in own]


def _episode(completion: str) -> Episode:
    episode = getattr(completion, "episode", None)
    if not isinstance(episode, Episode):
        raise RewardError("there is no episode whose messages or rewards could be read; set model.environment, or another reward")
    return episode


def _last(completion: str) -> Completion:
    episode = _episode(completion)
    assert isinstance(completion, Completion)
    return Completion(episode.answer, completion.num_tokens, completion.finished, completion.thinking, episode)
