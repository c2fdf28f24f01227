"""Several sources as one, each a named set."""

import math
from dataclasses import replace

from hybrid_lightning.data.source import PromptSource
from hybrid_lightning.data.splitting import Row, Splits
from hybrid_lightning.errors import ConfigError, DataError


class Mixture(PromptSource):
    """Named sets to train and to evaluate on; each prompt keeps the name of its set.

    Training draws from the sets in proportion to their weights, however many rows they have: small sets are gone through more
    often. Metrics of rollouts and evaluation are reported for each set besides, and `RewardBySet` gives each a reward of its own.
    Sets without training rows are only evaluated. No training row of any set asks what another set holds out.

    Args:
        sources: Name of the set -> where its problems come from.
        weights: Name of the set -> its share of the training prompts, of which only the ratios count; every set with training
            rows needs one. None: all training rows are one pool, which each epoch goes through once.

    Raises:
        ConfigError: If there is no set, a set is a mixture, or a weight is not positive or belongs to no set.

    Example:
        >>> from hybrid_lightning.data import ArithmeticSource, ProductSource
        >>> sets = {"sums": ArithmeticSource(validation_size=2), "products": ProductSource(validation_size=3)}
        >>> [row.set_name for row in Mixture(sets, {"sums": 3, "products": 1}).load().validation]
        ['sums', 'sums', 'products', 'products', 'products']
    """

    def __init__(self, sources: dict[str, PromptSource], weights: dict[str, float] | None = None) -> None:
        if not sources or "" in sources:
            raise ConfigError("Mixture: sources must name each set, as in sources: {gsm8k: {class_path: GSM8K}}")
        for name, source in sources.items():
            if isinstance(source, Mixture):
                raise ConfigError(f"Mixture: set {name!r} is a mixture itself: list its sets here")
        for name, weight in (weights or {}).items():
            if name not in sources:
                raise ConfigError(f"Mixture: weights has {name!r}, which is no set; the sets are {', '.join(sources)}")
            if not (math.isfinite(weight) and weight > 0):
                raise ConfigError(f"Mixture: the weight of {name!r} is {weight}: give a positive number, or leave the set out")
        self.sources = sources
        self.weights = weights

    def read(self) -> Splits:
        """Read all sets.

        Raises:
            DataError: If a set with training rows has no weight, or one without has.
        """
        splits: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
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
