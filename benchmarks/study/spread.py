"""Ranks of modules under one budget of trainable parameters, that of LoRA of some rank on all of them.

`mlp` leaves attention rank 1 and spreads the rest evenly over MLPs, `mlp_only` leaves attention none; both need no score.
`spectrum` gives the next rank to the module whose change in a short full fine-tuning has the largest next squared singular value
per parameter; `spectrum_mlp` does so within MLPs, attention has rank 1. Both take changes of other runs of the task. `own` and
`own_mlp` do the same by what `UpdateTail` looks at, 8 steps of the run's own that are not taken, and `shuffled` exchanges the
ranks of `own` among modules of one shape, anew for each seed.
"""

import heapq
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, ClassVar, Literal, get_args

from benchmarks.study.store import Content, Store
from hybrid_lightning.adapters.rank_pattern import module_group
from hybrid_lightning.adapters.scorers import UpdateTail
from hybrid_lightning.adapters.statistics import ModuleStatistics, require

Spread = Literal["mlp", "mlp_only", "spectrum", "spectrum_mlp", "own", "own_mlp", "shuffled"]
SPREADS: tuple[Spread, ...] = get_args(Spread)
OWN_SPREADS: tuple[Spread, ...] = ("own", "own_mlp", "shuffled")
Shape = tuple[int, int]


class KeptSpectra(UpdateTail):
    """Scores as `UpdateTail` does, and keeps the spectrum of each update for `taken`."""

    # A budget that makes it score; all candidates are one turn.
    OPTIONS: ClassVar[dict[str, Any]] = {
        "adapter.scorer": "benchmarks.study.spread.KeptSpectra",
        "adapter.budget.share": 0.99,
    }
    _kept: ClassVar[dict[str, list[float]]] = {}

    def score(self, statistics: ModuleStatistics, rank: int) -> float:
        self._kept[statistics.name] = require(statistics.update, "the update", self).spectrum().tolist()
        return super().score(statistics, rank)

    @classmethod
    def taken(cls) -> dict[str, list[float]]:
        """Name -> squared singular values of the last plan that was scored; they are forgotten then."""
        spectra = dict(cls._kept)
        cls._kept.clear()
        return spectra


def ranks_of(
    spread: Spread, shapes: Mapping[str, Shape], rank: int, spectra: Mapping[str, Sequence[float]], seed: int = 0
) -> dict[str, int]:
    """The rank of each module.

    Args:
        spread: How the budget is spent.
        shapes: Name -> shape of each module.
        rank: Of uniform LoRA with the same budget.
        spectra: Name -> squared singular values of its change, in descending order; not used by `mlp` and `mlp_only`.
        seed: Of `shuffled`.
    """
    budget = rank * sum(map(sum, shapes.values()))
    if spread == "shuffled":
        return _shuffled(water_filled(spectra, shapes, budget), shapes, seed)
    if spread in ("spectrum", "own"):
        return water_filled(spectra, shapes, budget)
    attention = {name: 0 if spread == "mlp_only" else 1 for name in shapes if module_group(name) == "attention"}
    mlps = {name: shape for name, shape in shapes.items() if name not in attention}
    rest = budget - sum(value * sum(shapes[name]) for name, value in attention.items())
    if spread in ("spectrum_mlp", "own_mlp"):
        return {**attention, **water_filled({name: spectra[name] for name in mlps}, mlps, rest)}
    # The nearest rank; where the next one is as near, the lower.
    return {**attention, **dict.fromkeys(mlps, round(rest / sum(map(sum, mlps.values())) - 1e-9))}


def _shuffled(ranks: Mapping[str, int], shapes: Mapping[str, Shape], seed: int) -> dict[str, int]:
    by_shape: dict[Shape, list[str]] = defaultdict(list)
    for name in ranks:
        by_shape[shapes[name]].append(name)
    rng, shuffled = random.Random(f"ranks {seed}"), {}
    for names in by_shape.values():
        drawn = [ranks[name] for name in names]
        rng.shuffle(drawn)
        shuffled |= dict(zip(names, drawn, strict=True))
    return {name: shuffled[name] for name in ranks}


def water_filled(spectra: Mapping[str, Sequence[float]], shapes: Mapping[str, Shape], budget: int) -> dict[str, int]:
    """Ranks from 0 on, each next one where the next squared singular value is largest per parameter, until nothing fits.

    Where the next rank would have more parameters than the weight, the next step is to train the module fully, which gains all
    that is left of its spectrum; its rank is then min(m, n).
    """
    ranks = dict.fromkeys(shapes, 0)
    queue: list[tuple[float, str, int, int]] = []  # value per parameter (negative), name, cost, rank after it

    def push(name: str) -> None:
        shape, rank = shapes[name], ranks[name]
        if not is_full(shape, rank + 1):
            cost = sum(shape)
            heapq.heappush(queue, (-spectra[name][rank] / cost, name, cost, rank + 1))
        elif rank < min(shape):
            cost = shape[0] * shape[1] - rank * sum(shape)
            heapq.heappush(queue, (-sum(spectra[name][rank:]) / max(cost, 1), name, cost, min(shape)))

    for name in shapes:
        push(name)
    while queue:
        _, name, cost, rank = heapq.heappop(queue)
        if cost <= budget:  # else a smaller module may still fit
            budget -= cost
            ranks[name] = rank
            push(name)
    return ranks


def is_full(shape: Shape, rank: int) -> bool:
    """Whether LoRA of this rank has more parameters than the weight."""
    return rank * sum(shape) > shape[0] * shape[1]


def mean_spectra(store: Store, task: str, way: str = "fft") -> dict[str, list[float]]:
    """The mean over seeds of the spectra that `python -m benchmarks.study.updates` has found.

    Raises:
        SystemExit: If there are none.
    """
    records = _records(store, task, way)
    names = records[0]["spectra"]
    return {name: [fmean(values) for values in zip(*(r["spectra"][name] for r in records), strict=True)] for name in names}


def mean_tails(store: Store, task: str, way: str, steps: int, rank: int = 8) -> dict[str, float]:
    """The mean over seeds of the energies beyond a rank, after some steps.

    Raises:
        SystemExit: If there are none.
    """
    records = _records(store, task, way)
    place = records[0]["ranks"].index(rank)
    names = records[0]["tails"][str(steps)]
    return {name: fmean(record["tails"][str(steps)][name][place] for record in records) for name in names}


def _records(store: Store, task: str, way: str) -> list[Content]:
    records = list(store.within(f"updates/{task}/{way}").values())
    if not records:
        raise SystemExit(
            f"error: there are no spectra of {task}: run python -m benchmarks.study.updates --task {task} --way {way} first"
        )
    return records
