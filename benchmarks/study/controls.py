"""What to compare with: the modules that the default score likes least, and rules that need no gradient."""

import re

from hybrid_lightning.adapters.scorers import ModuleStatistics, PreconditionedTail, Random, Scorer


class Bottom(PreconditionedTail):
    """The negative of `PreconditionedTail`: chooses the modules that it would choose last."""

    def score(self, statistics: ModuleStatistics, rank: int) -> float:
        return -super().score(statistics, rank)


class RandomMLP(Random):
    """A random choice among the modules of the MLPs, which are the largest: a better one than `Random` need not be large."""

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
    """`o_proj` and `down_proj` of the first layers: what won most often in the first runs."""

    def score(self, statistics: ModuleStatistics, rank: int) -> float:
        return float(statistics.name.endswith(("o_proj", "down_proj"))) + super().score(statistics, rank) / 1e3


class Largest(Scorer):
    """The modules with the most weights, for which low rank is the lowest in relation."""

    needs_gradient = False

    def score(self, statistics: ModuleStatistics, rank: int) -> float:
        return float(statistics.parameters)
