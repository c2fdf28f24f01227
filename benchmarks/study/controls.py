"""What to compare with: the modules that the default score likes least, rules that need no gradient, and another budget."""

import re
from collections import Counter
from collections.abc import Sequence

from hybrid_lightning.adapters.budgets import ModuleBudget
from hybrid_lightning.adapters.lora_settings import LoraSettings
from hybrid_lightning.adapters.plan import PlannedModule
from hybrid_lightning.adapters.scorers import PreconditionedTail, Random, Scorer
from hybrid_lightning.adapters.statistics import ModuleStatistics


class Bottom(PreconditionedTail):
    """The negative of `PreconditionedTail`: chooses the modules that it would choose last."""

    def score(self, statistics: ModuleStatistics, rank: int) -> float:
        return -super().score(statistics, rank)


class RandomMLP(Random):
    """A random choice among the modules of the MLPs, which are the largest: a better one than `Random` need not be large."""

    def score(self, statistics: ModuleStatistics, rank: int) -> float:
        return super().score(statistics, rank) + float(".mlp." in statistics.name)


class EarlyOutputs(Scorer):
    """`o_proj` and `down_proj` of the first layers: what most winners at toy scale have in common (see the design)."""

    needs_gradient = False

    def score(self, statistics: ModuleStatistics, rank: int) -> float:
        return float(statistics.name.endswith(("o_proj", "down_proj"))) - layer_of(statistics.name) / 1e3


class Early(Scorer):
    """Every module of the first layers."""

    needs_gradient = False

    def score(self, statistics: ModuleStatistics, rank: int) -> float:
        return -float(layer_of(statistics.name))


class Late(Scorer):
    """Every module of the last layers."""

    needs_gradient = False

    def score(self, statistics: ModuleStatistics, rank: int) -> float:
        return float(layer_of(statistics.name))


class Largest(Scorer):
    """The modules with the most weights, for which low rank is the lowest in relation."""

    needs_gradient = False

    def score(self, statistics: ModuleStatistics, rank: int) -> float:
        return float(statistics.parameters)


class SpreadBudget(ModuleBudget):
    """As many modules as `ModuleBudget` takes, dealt out over the decoder blocks.

    First come the modules that score highest in their blocks, then the second of each, and so on; of those the highest.
    """

    def _choose(self, modules: Sequence[PlannedModule], lora: LoraSettings) -> list[str]:
        place: dict[str, int] = {}  # of each module within its block
        taken: Counter[int] = Counter()
        ordered = sorted(modules, key=lambda module: (-(module.score or 0.0), module.name))
        for module in ordered:
            place[module.name] = taken[layer_of(module.name)]
            taken[layer_of(module.name)] += 1
        ordered.sort(key=lambda module: place[module.name])  # which keeps the order of equals
        return [module.name for module in ordered[: len(super()._choose(modules, lora))]]


def layer_of(name: str) -> int:
    """Number of the decoder block that a module lies in."""
    found = re.search(r"\.(\d+)\.", name)
    assert found, name
    return int(found[1])
