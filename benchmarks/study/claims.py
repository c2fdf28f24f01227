"""The results of the frontier: points by task and method, claims as distances between points, and all tasks at one size."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import fmean

from benchmarks.study.comparison import Point, Points
from benchmarks.study.estimates import difference, gap_closed, holm, mean, p_value
from benchmarks.study.records import Purpose, of_method
from benchmarks.study.store import Store
from benchmarks.study.tables import markdown
from benchmarks.study.tuning import means

LORA = ("lora_r1", "lora", "lora_r4", "lora_r8", "lora_r16", "lora_r25", "lora_r64", "fft")
ENDS = ("lora_r4", "fft")  # of the gap
MLPS = ("mlp_r4", "mlp_r8", "mlp_r16", "mlp_r25", "mlp_r64", "fft")
# The page has these of all tasks beside each other.
SHOWN = (
    *(*LORA[1:5], *MLPS[:3], "hybrid", "hybrid_one_rate", "hybrid_10_r8", "hybrid_10_r8_by_width"),
    *("hybrid_10_r8_one_rate", "update_tail_10_r8_one_rate", "random_mlp_10_r8_one_rate", "fft"),
)
# Claims that the first method is above the second, at one size. NAME@ is the method at the other one's rate.
PAIRS = (
    *(("update_tail_10_r2", "random_mlp"), ("update_tail_10_r8", "random_mlp_10_r8")),
    *(("update_tail_10_r2_one_rate", "random_mlp_one_rate"), ("update_tail_10_r2_one_rate", "random_mlp_one_rate@")),
    ("update_tail_10_r8_one_rate", "random_mlp_10_r8_one_rate"),
    *(("update_tail_10_r2_one_rate", "hybrid_one_rate"), ("update_tail_10_r8_one_rate", "hybrid_10_r8_one_rate")),
    *(("hybrid", "random_mlp"), ("hybrid_10_r8_by_width", "random_mlp_10_r8"), ("hybrid_one_rate", "random_mlp_one_rate@")),
    ("hybrid_10_r8_one_rate", "random_mlp_10_r8_one_rate"),
    *((f"mlp_r{rank}", f"lora_r{rank}") for rank in (4, 8, 16, 25, 64)),
    ("mlp_only_r8", "mlp_r8"),
    *(("hybrid_one_rate", "hybrid"), ("hybrid_by_width", "hybrid_one_rate"), ("hybrid_10_r8_one_rate", "hybrid_10_r8")),
    *(("hybrid_10_r8_by_width", "hybrid_10_r8_one_rate"), ("hybrid_10_r8_half_rate", "hybrid_10_r8_one_rate")),
    *(("hybrid_10_r8_by_width", "hybrid_10_r8"), ("hybrid_10_r8_by_width", "hybrid_10_r8@0.002")),
    *(("fft", "lora_r4"), ("fft", "mlp_r16"), ("hybrid_10_r8_by_width", "lora_r16")),  # of different sizes
)
# Beside the line through the LoRAs of all ranks, at their size.
BESIDE_LORA = (
    *("hybrid", "hybrid_one_rate", "hybrid_10_r8", "hybrid_10_r8_one_rate", "hybrid_10_r8_by_width"),
    "update_tail_10_r8_one_rate",
)
# The product's default ratio of the two rates, 96 / hidden size and at most 1, by task: where it is not 1, it has a method of its
# own. It stands beside the one of 0.3 and 1 that is best in a task's sweeps.
DEFAULT_RATIO = {"default ratio": "hybrid", "default ratio beside rank 8": "hybrid_10_r8"}
BY_DEFAULT = {"products_direct": "three_quarters_rate", "new_order_wide": "half_rate"}
# Tasks with claims in one group: the tasks on which the formulas were chosen, and others.
GROUPS = {
    "old_tasks": ("facts", "facts_deep", "products_direct"),
    "new_tasks": ("new_automaton", "new_order", "new_order_wide", "smollm2_codes"),
}
# Cells of all claims that were ever made on them, minus the cells that are no longer shown and were bold.
LOOKED_AT = {"old_tasks": 304, "new_tasks": 238}


def points_of(store: Store, task: str) -> Points:
    """The points of a task; runs at a given rate instead of a tuned one are named METHOD@RATE."""
    memory = store.within(f"memory/{task}")
    points, policies = {}, dict[int, str]()
    purposes: tuple[Purpose, ...] = ("frontier", "trial")
    for purpose in purposes:
        for method in store.folders(f"{purpose}/{task}"):
            records = of_method(store, purpose, task, method)
            for record in records:
                same_policy(task, record.seed, policies.setdefault(record.seed, record.model_digest), record.model_digest)
            name = method if purpose == "frontier" else f"{method}@{records[0].learning_rate:g}"
            points[name] = Point(name, records, memory.get(f"{name}.json", {}).get("bytes"))
    return points


def same_policy(task: str, seed: int, first: str, other: str) -> None:
    """Raise SystemExit unless these digests belong to one start policy, since other policies would look like other methods."""
    if first != other:
        raise SystemExit(
            f"error: seed {seed} of {task} has runs from start policy {first}, and from or for {other}: one was made on another "
            "machine or version of PyTorch; take other seeds, or remove the runs from one of them"
        )


def tuned_ratios(store: Store, task: str) -> dict[str, str]:
    """For each hybrid, the better of the ratios 0.3 and 1 in the sweeps of a task, if both were tuned."""
    found = {}
    for hybrid in DEFAULT_RATIO.values():
        tuned = {name: means(of_method(store, "sweep", task, name)) for name in (hybrid, f"{hybrid}_one_rate")}
        if all(tuned.values()):
            found[hybrid] = max(tuned, key=lambda name: max(tuned[name].values()))
    return found


def line_at(points: Points, family: Sequence[str], trained: float) -> dict[int, float]:
    """Accuracy by seed of a family at a number of trained parameters, interpolated linearly in its logarithm.

    Empty outside of the family's range.
    """
    there = sorted((points[name] for name in family if name in points), key=lambda point: point.trained)
    for low, high in pairwise(there):
        if low.trained <= trained <= high.trained:
            part = math.log(trained / low.trained) / math.log(high.trained / low.trained)
            seeds = low.by_seed.keys() & high.by_seed.keys()
            return {seed: (1 - part) * low.by_seed[seed] + part * high.by_seed[seed] for seed in seeds}
    return {}


Difference = dict[int, float]  # seed -> points


def _claims(tasks: Mapping[str, Points], ratios: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, dict[str, Difference]]]:
    """Each claim with its differences by task and seed."""
    for ours, theirs in PAIRS:
        words = f"{ours} less {theirs.removesuffix('@')}" + (" at its rate" if theirs.endswith("@") else "")
        yield words, {task: _between(points, ours, theirs) for task, points in tasks.items()}
    for words, hybrid in DEFAULT_RATIO.items():
        found = {
            task: _between(points, f"{hybrid}_{BY_DEFAULT.get(task, 'one_rate')}", ratios.get(task, {}).get(hybrid, ""))
            for task, points in tasks.items()
        }
        yield f"{words} less the fixed ratio that tuning chose", found
    for family, words in ((LORA, "LoRA"), (MLPS, "LoRA on MLPs")):
        for name in BESIDE_LORA:
            found = {
                task: _less(points[name].by_seed, line_at(points, family, points[name].trained))
                for task, points in tasks.items()
                if name in points
            }
            yield f"{name} less {words} of its size", found


def _between(points: Points, ours: str, theirs: str) -> Difference:
    """Differences of two methods; empty if one was not run, or not at the other's rate."""
    if ours not in points:
        return {}
    rate = points[ours].rate
    if theirs.endswith("@"):
        plain = points.get(theirs.removesuffix("@"))
        other = plain if plain and plain.rate == rate else points.get(f"{theirs}{rate:g}")
    else:
        other = points.get(theirs)
    return _less(points[ours].by_seed, other.by_seed) if other else {}


def _less(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}


def claims_table(tasks: Mapping[str, Points], ratios: Mapping[str, Mapping[str, str]], looked_at: int = 0) -> str:
    """Every claim on every task that has its methods, and on the mean of these tasks.

    Cells that remain significant after Holm's correction over all cells, at 5%, are bold.
    """
    rows: list[tuple[str, list[Difference]]] = []  # an empty cell was not run, or is larger or smaller than the line is long
    for name, found in _claims(tasks, ratios):
        there = [values for values in found.values() if values]
        common = set.intersection(*map(set, there)) if len(there) > 1 else ()
        over_tasks = {seed: fmean(values[seed] for values in there) for seed in common}
        if there:
            rows.append((name, [*(found.get(task, {}) for task in tasks), over_tasks]))
    p_values = [p_value(list(cell.values())) for _, cells in rows for cell in cells if cell]
    kept = iter(holm(p_values + [1.0] * (looked_at - len(p_values))))

    def text(cell: Difference) -> str:
        if not cell:
            return "-"
        words = mean(list(cell.values())).text()
        return f"**{words}**" if next(kept) else words

    return markdown(("points", *tasks, "mean"), [(name, *map(text, cells)) for name, cells in rows])


def at_one_size(tasks: Mapping[str, Points]) -> str:
    """All tasks at the size of a 10% hybrid with rank 8: means over the seeds that all methods of a row have, if any."""
    rows = []
    for task, points in tasks.items():
        hybrid = next((name for name in ("hybrid_10_r8_one_rate", "hybrid_10_r8_by_width") if name in points), None)
        if hybrid is None or not {"lora_r4", "fft"} <= points.keys():
            continue
        size = points[hybrid].trained
        lines = (line_at(points, LORA, size), line_at(points, MLPS, size))
        columns = (points["lora_r4"].by_seed, *lines, points[hybrid].by_seed, points["fft"].by_seed)
        if seeds := set.intersection(*map(set, columns)):
            share = f"{100 * size / points['fft'].trained:.0f}"
            rows.append((task, str(len(seeds)), share, *(f"{100 * fmean(each[seed] for seed in seeds):.1f}" for each in columns)))
    head = ("task", "seeds", "% of FFT's parameters", "LoRA of rank 4", "LoRA", "LoRA on MLPs", "hybrid", "FFT")
    return markdown(head, rows) if rows else ""


def accuracies_table(tasks: Mapping[str, Points]) -> str:
    """Accuracy of the main methods on all tasks, over the seeds of full fine-tuning, for methods that have these seeds."""
    rows = []
    for name in SHOWN:
        cells = []
        for points in tasks.values():
            ours, seeds = (points[each].by_seed if each in points else {} for each in (name, "fft"))
            cells.append(mean([ours[seed] for seed in seeds]).text() if seeds and seeds.keys() <= ours.keys() else "-")
        if any(cell != "-" for cell in cells):
            rows.append((name, *cells))
    return markdown(("accuracy, %", *tasks), rows)


def points_table(points: Points) -> str:
    """The methods of a task by size; gaps are from LoRA of rank 4 to full fine-tuning."""
    header = ("method", "seeds", "rate", "trained", "peak, MiB", "accuracy %", "less LoRA of its size", "gap closed %")
    rows = []
    for point in sorted(points.values(), key=lambda point: (point.trained, point.method)):
        line = difference(point.by_seed, line_at(points, LORA, point.trained)) if point.method not in LORA else None
        ends = ({}, {}) if point.method in ENDS else (points[end].by_seed if end in points else {} for end in ENDS)
        closed = gap_closed(point.by_seed, *ends)
        peak = "-" if point.memory is None else f"{point.memory / 2**20:.2f}"
        others = ("-" if line is None else line.text(), "-" if closed is None else closed.text(digits=0))
        numbers = (str(len(point.records)), f"{point.rate:g}", f"{point.trained:,.0f}", peak, point.accuracy.text())
        rows.append((point.method, *numbers, *others))
    return markdown(header, rows)
