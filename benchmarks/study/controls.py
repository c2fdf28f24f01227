"""Controls: the modules with the lowest default score, and rules that need no gradient."""

import re

from hybrid_lightning.adapters.scorers import ModuleStatistics, PreconditionedTail, Random, Scorer


class Bottom(PreconditionedTail):
    """The negative of `PreconditionedTail`: chooses the modules that `PreconditionedTail` would choose last."""

    def score(self, statistics: ModuleStatistics, rank: int) -> float:
        return -super().score(statistics, rank)


class RandomMLP(Random):
    """A random choice among the MLP modules, which are the largest: separates the effect of size from the choice."""

    def score(self, statistics: ModuleStatistics, rank: int) -> float:
        return super().score(statistics, rank) + float(".mlp." in statistics.name)


class Late(Scorer):
    """Every module of the last layers."""

    needs_gradient = False

    def score(self, statistics: ModuleStatistics, rank: int) -> float:
        found = re.search(r"\.(\d+)\.", statistics.name)
        assert found, statistics.name
        return float(found[1])


class Early(Late):
    """Every module of the first layers."""

    def score(self, statistics: ModuleStatistics, rank: int) -> float:
        return -super().score(statistics, rank)


class EarlyOutputs(Early):
    """`o_proj` and `down_proj` of the first layers, which won most often in the first runs."""

    def score(self, statistics: ModuleStatistics, rank: int) -> float:
        return float(statistics.name.endswith(("o_proj", "down_proj"))) + super().score(statistics, rank) / 1e3


class Largest(Scorer):
    """The modules with the most weights, for which low rank is relatively lowest."""

    needs_gradient = False

    def score(self, statistics: ModuleStatistics, rank: int) -> float:
        return float(statistics.parameters)
