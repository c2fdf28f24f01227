"""The length reward of Kimi k1.5 (arXiv 2501.12599, section 2.3.3): linear within the completions of a prompt.

    lambda = 0.5 - (L - L_min) / (L_max - L_min)

over the completions of the same prompt; a right completion earns lambda, a wrong one min(0, lambda), and nobody anything where
all are of one length. It is added to the reward for correctness.
"""

from collections import defaultdict
from collections.abc import Sequence

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.rewards.base import RewardFunction
from hybrid_lightning.rewards.extraction import token_counts
from hybrid_lightning.rewards.remembered import Remembered
from hybrid_lightning.types import Prompt


class GroupLength(RewardFunction):
    """Adds to a reward for correctness one for being shorter than the prompt's other completions.

    Args:
        reward: Says which completions are right, by 1.0; it counts in full.
        weight: Of the length reward, which is from -0.5 to 0.5; the paper raises it during training, and names no value.
        name: What it is logged as; None for `group_length`.

    Raises:
        ConfigError: If the weight is not positive, or `reward` does not measure correctness.
    """

    measures_correctness = False

    def __init__(self, reward: RewardFunction, weight: float = 1.0, name: str | None = None) -> None:
        if not weight > 0:
            raise ConfigError(f"GroupLength: weight={weight}: give a positive number, at most 1 where right must beat short")
        self.reward = Remembered(reward, type(self).__name__)
        self.weight = weight
        self._name = name

    def terms(self) -> list[tuple[RewardFunction, float]]:
        """The reward for correctness and this one."""
        return [(self.reward, 1.0), (self, self.weight)]

    def check_prompt(self, prompt: Prompt) -> None:
        """As the reward for correctness does."""
        self.reward.check_prompt(prompt)

    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[float]:
        """Length reward of each completion, of B, before weighting."""
        lengths = token_counts(type(self).__name__, completions)
        right = self.reward.correct(completions, prompts)
        groups: dict[tuple[str, str, int], list[int]] = defaultdict(list)
        for position, prompt in enumerate(prompts):
            groups[prompt.set_name, prompt.source, prompt.index].append(position)
        values = [0.0] * len(completions)
        for group in groups.values():
            shortest, longest = min(lengths[position] for position in group), max(lengths[position] for position in group)
            for position in group if longest > shortest else []:
                value = 0.5 - (lengths[position] - shortest) / (longest - shortest)
                values[position] = value if right[position] else min(0.0, value)
        return values
