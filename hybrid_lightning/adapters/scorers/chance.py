"""Chance, the score that every other one has to beat."""

import hashlib

from hybrid_lightning.adapters.scorers.base import Scorer
from hybrid_lightning.adapters.statistics import ModuleStatistics


class Random(Scorer):
    """A uniform number between 0 and 1 that depends on seed and module name only; needs no calibration.

    Args:
        seed: another seed chooses other modules.
    """

    needs_gradient = False

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(self, statistics: ModuleStatistics, rank: int) -> float:  # noqa: D102
        digest = hashlib.sha256(f"{self.seed} {statistics.name}".encode()).digest()
        return int.from_bytes(digest[:6], "big") / 2**48
