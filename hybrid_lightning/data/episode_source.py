"""`EpisodeSource`: rows for environments that draw their own tasks, such as games."""

import random

from hybrid_lightning.data.source import PromptSource
from hybrid_lightning.data.splitting import Row, Splits
from hybrid_lightning.errors import ConfigError

_SPLITS = ("train", "validation", "test")
_SEEDS = 2**31 // len(_SPLITS)  # of each split; an environment's seeds are below 2^31


class EpisodeSource(PromptSource):
    """Tasks that an environment draws from a seed: the rows differ in the column `seed` alone, from which episodes begin.

    No seed of a split is in another one, whatever `seed` and the numbers of rows are. Two seeds may still give the same task,
    where the environment has few of them.

    Args:
        count: Number of training tasks.
        seed: Seed from which the seeds are drawn.
        validation_count: Number of validation tasks.
        test_count: Number of test tasks.
        prompt: What the policy is asked in front of what the environment says.

    Raises:
        ConfigError: If a number is negative, or there is no task.

    Example:
        >>> splits = EpisodeSource(count=2, validation_count=1, prompt="Guess the number.").load()
        >>> [(row.question, row.columns) for row in splits.train]
        [('Guess the number.', {'seed': 1657007793}), ('Guess the number.', {'seed': 1567570662})]
    """

    def __init__(
        self,
        count: int = 1000,
        seed: int = 0,
        validation_count: int = 100,
        test_count: int = 100,
        prompt: str = "Play the game.",
    ) -> None:
        counts = {"count": count, "validation_count": validation_count, "test_count": test_count}
        for name, value in counts.items():
            if not 0 <= value <= _SEEDS:
                raise ConfigError(f"EpisodeSource: {name}={value}; give 0 to {_SEEDS} tasks")
        if not sum(counts.values()):
            raise ConfigError("EpisodeSource: count, validation_count and test_count are all 0; ask for at least one task")
        self.seed, self.prompt = seed, prompt
        self._counts = dict(zip(_SPLITS, counts.values(), strict=True))

    def read(self) -> Splits:
        """Draw the seeds of each split."""
        return Splits(**{split: self._rows(split, number) for number, split in enumerate(_SPLITS)})

    def _rows(self, split: str, number: int) -> list[Row]:
        drawn = random.Random(f"{self.seed} {split}").sample(range(_SEEDS), self._counts[split])
        seeds = [len(_SPLITS) * value + number for value in drawn]
        return [
            Row(self.prompt, None, index, type(self).__name__, {"seed": seed}, task=f"seed {seed}")
            for index, seed in enumerate(seeds)
        ]
