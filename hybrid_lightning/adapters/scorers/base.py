"""`Scorer`: what a sensitivity score is, and how to write one.

The definitions in this folder are this project's own: the public text of Hybrid-LoRA (arXiv 2605.18822) gives the
idea, a module's sensitivity to low-rank adaptation under a fixed budget, and not the formula.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from hybrid_lightning.adapters.statistics import ModuleStatistics
from hybrid_lightning.parts import Part


class Scorer(Part, ABC):
    """Turns the calibration statistics of one module into one number; the higher, the more it wants full training.

    A scorer of your own is a subclass, named by its `class_path`. The class attributes say which statistics to collect, and
    whether several modules may be scored at a time.

    Example:
        >>> class LargestSingularValue(Scorer):
        ...     def score(self, statistics: ModuleStatistics, rank: int) -> float:
        ...         return float(statistics.gradient.spectrum()[0])
    """

    needs_gradient: ClassVar[bool] = True  # `gradient`: without it no calibration pass is made
    needs_halves: ClassVar[bool] = False  # `noise`
    needs_loss: ClassVar[bool] = False  # `evaluate_loss`
    concurrent: ClassVar[bool] = False  # `score` may run for several modules at a time: it only reads, and keeps nothing

    @abstractmethod
    def score(self, statistics: ModuleStatistics, rank: int) -> float:
        """Score one module.

        Args:
            statistics: of that module.
            rank: LoRA rank r.

        Returns:
            A finite number.
        """
