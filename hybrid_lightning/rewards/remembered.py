"""`Remembered`: a reward whose values another one needs too, so that nothing is scored twice."""

from collections.abc import Sequence

from torch import Tensor

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.rewards.base import RewardFunction
from hybrid_lightning.types import Prompt


class Remembered(RewardFunction):
    """A reward that keeps what it said of the last batch.

    Args:
        reward: The reward; one that measures correctness, and no sum.
        user: Name of the class that needs it, for error messages.

    Raises:
        ConfigError: If the reward is a sum, or measures something else.
    """

    def __init__(self, reward: RewardFunction, user: str) -> None:
        if reward.terms() != [(reward, 1.0)] or not reward.measures_correctness:
            raise ConfigError(
                f"{user}: reward={type(reward).__name__} must be one reward that measures correctness, such as MathMatch; put "
                f"further rewards beside {user} into a WeightedSum"
            )
        self.reward = reward
        self._last: tuple[Sequence[str], Sequence[Prompt], Sequence[float] | Tensor] | None = None

    @property
    def name(self) -> str:
        """That of the reward."""
        return self.reward.name

    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> Sequence[float] | Tensor:
        """Score completions, unless they are the very objects that were scored last."""
        if self._last is None or self._last[0] is not completions or self._last[1] is not prompts:
            self._last = (completions, prompts, self.reward(completions, prompts))
        return self._last[2]

    def correct(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[bool]:
        """Whether each completion, of B, is right."""
        return [float(value) >= 1.0 for value in self(completions, prompts)]

    def extract_answer(self, completion: str, prompt: Prompt) -> str | None:
        """As the reward does."""
        return self.reward.extract_answer(completion, prompt)

    def decided_by_time(self) -> str | None:
        """As the reward does."""
        return self.reward.decided_by_time()

    def check_prompt(self, prompt: Prompt) -> None:
        """As the reward does."""
        self.reward.check_prompt(prompt)
