"""`PromptSource`: where problems come from. A config swaps this class to train on other data.

`Mixture` joins several sources, each as a named set. `EpisodeSource` makes rows for environments that draw their own tasks.
"""

import math
import random
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from hybrid_lightning.data.splitting import Row, Splits, without_overlap
from hybrid_lightning.errors import ConfigError, DataError
from hybrid_lightning.shared.configurable import Configurable

_SPLITS = ("train", "validation", "test")
_OVERLAPS = {
    "train": "training rows that also occur in validation or test",
    "validation": "validation rows that also occur in test",
}
_SEEDS = 2**31 // len(_SPLITS)  # of each split; an environment's seeds are below 2^31


class PromptSource(Configurable, ABC):
    """Problems in up to three splits: train, validation and test.

    To write your own source, implement `read` and nothing else:

    Example:
        >>> class Doubling(PromptSource):
        ...     def __init__(self, size: int = 100) -> None:
        ...         self.size = size
        ...     def read(self) -> Splits:
        ...         rows = [Row(f"2*{n}=", str(2 * n), index=n, source="doubling") for n in range(self.size)]
        ...         return Splits(train=rows[10:], validation=rows[:10])
        >>> splits = Doubling(size=20).load()
        >>> len(splits.train), splits.validation[3].answer
        (10, '6')
    """

    @abstractmethod
    def read(self) -> Splits:
        """Read or generate all rows. It must be deterministic: every rank and every resumed run needs the same rows."""

    def load(self) -> Splits:
        """Read the splits and remove problems that are in two of them.

        Training rows that also occur in validation or test are dropped, and so are validation rows that also occur in test; the
        number of dropped rows is logged. Questions are compared regardless of case and spacing (see `problem_key`).

        Returns:
            Splits that have no question in common.

        Raises:
            DataError: If two rows of a split have the same index, if a split loses all its rows, or if `read` returns anything
                but splits of rows of text.
        """
        splits = self.read()
        _check(type(self).__name__, splits)
        splits, dropped = without_overlap(splits)
        for name, count in dropped.items():
            if count:
                rank_zero_info(f"{type(self).__name__}: dropped {count} {_OVERLAPS[name]}")
        return splits


class Mixture(PromptSource):
    """Named sets of problems to train and evaluate on; each prompt keeps the name of its set.

    Training draws from the sets in proportion to their weights, however many rows they have, so that small sets are repeated more
    often. Metrics of rollouts and evaluation are also reported for each set, and `RewardBySet` gives each set its own reward.
    Sets without training rows are only evaluated. A training row is dropped if it also occurs in another set's validation or
    test rows.

    Args:
        sources: Name of the set -> source of its problems.
        weights: Name of the set -> its weight in training. Only the ratios count, and every set with training rows needs a
            weight. None: all training rows form one pool, and each epoch uses every row once.

    Raises:
        ConfigError: If no set is given, a set is itself a mixture, or a weight is not positive or names an unknown set.

    Example:
        >>> from hybrid_lightning.data import ArithmeticSource, ProductSource
        >>> sets = {"sums": ArithmeticSource(validation_size=2), "products": ProductSource(validation_size=3)}
        >>> [row.set_name for row in Mixture(sets, {"sums": 3, "products": 1}).load().validation]
        ['sums', 'sums', 'products', 'products', 'products']
    """

    def __init__(self, sources: dict[str, PromptSource], weights: dict[str, float] | None = None) -> None:
        if not sources or "" in sources:
            raise ConfigError("Mixture: a set has no name; name each, as in sources: {gsm8k: {class_path: GSM8K}}")
        for name, source in sources.items():
            if isinstance(source, Mixture):
                raise ConfigError(f"Mixture: set {name!r} is a mixture itself; list its sets here")
        for name, weight in (weights or {}).items():
            if name not in sources:
                raise ConfigError(f"Mixture: weights has {name!r}, which is not a set; the sets are {', '.join(sources)}")
            if not (math.isfinite(weight) and weight > 0):
                raise ConfigError(f"Mixture: the weight of {name!r} is {weight}; give a positive number, or leave the set out")
        self.sources = sources
        self.weights = weights

    def read(self) -> Splits:
        """Read all sets and mark each row with its set and weight.

        Raises:
            DataError: If a set with training rows has no weight, or a set without training rows has one.
        """
        splits: dict[str, list[Row]] = {split: [] for split in _SPLITS}
        for name, source in self.sources.items():
            for split, rows in vars(source.load()).items():
                weight = self._weight(name, bool(rows)) if split == "train" else None
                splits[split] += [replace(row, set_name=name, set_weight=weight) for row in rows]
        return Splits(**splits)

    def _weight(self, name: str, has_rows: bool) -> float | None:
        if self.weights is None:
            return None
        weight = self.weights.get(name)
        if has_rows and weight is None:
            raise DataError(f"Mixture: set {name!r} has training rows but no weight; add it to weights, or drop its train split")
        if weight is not None and not has_rows:
            raise DataError(f"Mixture: set {name!r} has a weight but no training rows; give its source a train split")
        return weight


class EpisodeSource(PromptSource):
    """Tasks that an environment draws from a seed. The rows differ only in the column `seed`, which starts the episode.

    No two splits share a seed, whatever `seed` and the numbers of rows are. Two seeds may still give the same task if the
    environment has few tasks.

    Args:
        count: Number of training tasks.
        seed: Seed from which the seeds are drawn.
        validation_count: Number of validation tasks.
        test_count: Number of test tasks.
        prompt: Text for the policy before the environment's first message.

    Raises:
        ConfigError: If a number is negative or too large, or all are 0.

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
            raise ConfigError("EpisodeSource: count, validation_count and test_count are all 0; set at least one of them")
        self.seed, self.prompt = seed, prompt
        self._counts = dict(zip(_SPLITS, counts.values(), strict=True))

    def read(self) -> Splits:
        """Draw the seeds of each split."""
        return Splits(**{split: self._rows(split, number) for number, split in enumerate(_SPLITS)})

    def _rows(self, split: str, number: int) -> list[Row]:
        drawn = random.Random(f"{self.seed} {split}").sample(range(_SEEDS), self._counts[split])
        seeds = [len(_SPLITS) * value + number for value in drawn]
        kind = type(self).__name__
        return [Row(self.prompt, None, index, kind, {"seed": seed}, task=f"seed {seed}") for index, seed in enumerate(seeds)]


def _check(name: str, splits: Any) -> None:
    """Reject easy mistakes in a user's source here, since later they would show up far away from it."""
    if not isinstance(splits, Splits):
        raise DataError(f"{name}.read returned a {type(splits).__name__}; return Splits(train=[Row(...), ...], ...)")
    for split, rows in vars(splits).items():
        seen: set[tuple[str, int]] = set()
        for position, row in enumerate(rows):
            if not isinstance(row, Row):
                raise DataError(f"{name}.read: {split} row {position} is a {type(row).__name__}; make it a Row(question, answer)")
            for field, allowed in (("question", str), ("answer", (str, type(None)))):
                value = getattr(row, field)
                if not isinstance(value, allowed):
                    raise DataError(f"{name}.read: the {field} of {split} row {position} is {value!r}; give text, as in str(...)")
            if (row.set_name, row.index) in seen:
                raise DataError(f"two {split} rows from {row.source!r} have index {row.index}; give each row its own index")
            seen.add((row.set_name, row.index))
