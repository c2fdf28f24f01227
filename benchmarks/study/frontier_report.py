"""What the frontier says: a point for each method and claims as vertical distances in `frontier.md`, and a figure a task."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from benchmarks.study.estimates import Estimate, difference, gap_closed, holm, mean, p_value
from benchmarks.study.methods import METHODS
from benchmarks.study.records import Record, of_method
from benchmarks.study.store import Store
from benchmarks.study.tables import markdown
from benchmarks.study.tuning import means

LORA = ("lora_r1", "lora", "lora_r4", "lora_r8", "lora_r16", "lora_r25", "lora_r64", "fft")
MLPS = ("mlp_r4", "mlp_r8", "mlp_r16", "mlp_r25", "mlp_r64", "fft")
LINES = {
    "LoRA": (LORA, "#66a182", "o-"),
    "LoRA on MLPs, attention rank 1": (MLPS[:-1], "#8a5aa8", "s--"),
    "LoRA on MLPs alone": (("mlp_only_r4", "mlp_only_r8"), "#8d8d8d", "v:"),
    "ranks by spectra": (("own_r2", "own_r4", "own_r8", "own_r16"), "#d1495b", "D-"),
    "ranks by spectra within MLPs": (("own_mlp_r4", "own_mlp_r8"), "#e09f3e", "^:"),
    "hybrid 2 to 40%, rank 2 beside": (("budget_2", "budget_5", "hybrid", "budget_20", "budget_40"), "#1f6fb2", "o--"),
    "hybrid 10%, rank 1 to 8 beside": (("hybrid_10_r1", "hybrid", "hybrid_10_r4", "hybrid_10_r8"), "#4aa3df", "x:"),
    "hybrid 10 to 40%, rank 8 beside": (("hybrid_10_r8", "hybrid_20_r8", "hybrid_40_r8"), "#0b3c5d", "P--"),
    "UpdateTail 10%, rank 2 and 8": (("update_tail_10_r2", "update_tail_10_r8"), "#2e7d32", "*-."),
    "rates by width 10%, rank 2 and 8": (("hybrid_by_width", "hybrid_10_r8_by_width"), "#7b5d3b", "p-."),
    "rates by width 10%, MLPs rank 14, attention 1": (("hybrid_10_mlp14_by_width",), "#e76f51", "X:"),
    "dealt over blocks 10%, rank 8": (("spread_10_r8_by_width",), "#00838f", "d:"),
    "random MLPs 10%, rank 2 and 8": (("random_mlp", "random_mlp_10_r8"), "#9e9d24", "<:"),
    "one rate 10%, rank 2 and 8": (("hybrid_one_rate", "hybrid_10_r8_one_rate"), "#c2185b", "h-."),
    "one rate, UpdateTail": (("update_tail_10_r2_one_rate", "update_tail_10_r8_one_rate"), "#1b5e20", "H:"),
    "one rate, random MLPs": (("random_mlp_one_rate", "random_mlp_10_r8_one_rate"), "#6d6d1f", ">:"),
}
# Differences of methods of one size: what is claimed to be above what.
PAIRS = (
    *(("update_tail_10_r2", "random_mlp"), ("update_tail_10_r8", "random_mlp_10_r8"), ("update_tail_10_r2", "hybrid")),
    *(("update_tail_10_r2_one_rate", "random_mlp_one_rate"), ("update_tail_10_r8_one_rate", "random_mlp_10_r8_one_rate")),
    *(("update_tail_10_r2_one_rate", "hybrid_one_rate"), ("update_tail_10_r8_one_rate", "hybrid_10_r8_one_rate")),
    *(("own_r2", "lora"), ("own_r4", "lora_r4"), ("own_r8", "lora_r8"), ("own_r16", "lora_r16")),
    *(("own_r4", "mlp_r4"), ("own_r8", "mlp_r8"), ("own_r16", "mlp_r16"), ("own_r4", "shuffled_r4"), ("own_r8", "shuffled_r8")),
    *(("own_mlp_r4", "mlp_r4"), ("own_mlp_r8", "mlp_r8"), ("mlp_r4", "lora_r4"), ("mlp_r8", "lora_r8"), ("mlp_r16", "lora_r16")),
    *(("mlp_r25", "lora_r25"), ("mlp_r64", "lora_r64")),
    *(("mlp_only_r4", "lora_r4"), ("mlp_only_r8", "lora_r8"), ("mlp_only_r4", "mlp_r4"), ("mlp_only_r8", "mlp_r8")),
    *(("hybrid_one_rate", "hybrid"), ("hybrid_10_r8_one_rate", "hybrid_10_r8")),
    *(("hybrid_by_width", "hybrid"), ("hybrid_10_r8_by_width", "hybrid_10_r8")),
    *(("hybrid_10_r8_half_rate", "hybrid_10_r8_by_width"), ("hybrid_10_r8_half_rate", "hybrid_10_r8_one_rate")),
    ("hybrid_10_mlp14_by_width", "hybrid_10_r8_by_width"),
    *(("spread_10_r8_by_width", "hybrid_10_r8_by_width"), ("spread_10_r8_by_width", "random_spread_10_r8_by_width")),
    *(("random_spread_10_r8_by_width", "random_mlp_10_r8_by_width"), ("hybrid_10_r8_by_width", "random_mlp_10_r8_by_width")),
    *(
        ("hybrid", "random_mlp"),
        ("hybrid_one_rate", "random_mlp_one_rate"),
        ("hybrid_10_r8_one_rate", "random_mlp_10_r8_one_rate"),
    ),
    *(("hybrid_by_width", "hybrid_one_rate"), ("hybrid_10_r8_by_width", "hybrid_10_r8_one_rate")),
)
# Beside the line through the LoRAs of all ranks, at their size.
BESIDE_LORA = (
    *("budget_5", "hybrid", "budget_20", "budget_40", "hybrid_one_rate"),
    *("hybrid_10_r4", "hybrid_10_r8", "hybrid_20_r8", "hybrid_40_r8", "hybrid_10_r8_one_rate"),
    *("hybrid_by_width", "hybrid_10_r8_by_width", "hybrid_10_mlp14_by_width", "spread_10_r8_by_width"),
    *("update_tail_10_r2", "update_tail_10_r8", "update_tail_10_r2_one_rate", "update_tail_10_r8_one_rate"),
)


# A rule for the ratio of a hybrid's two rates -> fixed ratios, of which each task is given the best one in tuning.
RATIOS = {
    "hybrid_by_width": ("hybrid", "hybrid_one_rate"),
    "hybrid_10_r8_by_width": ("hybrid_10_r8", "hybrid_10_r8_one_rate"),
    "hybrid_one_rate": ("hybrid", "hybrid_one_rate"),
    "hybrid_10_r8_one_rate": ("hybrid_10_r8", "hybrid_10_r8_one_rate"),
    "default ratio": ("hybrid", "hybrid_one_rate"),
    "default ratio beside rank 8": ("hybrid_10_r8", "hybrid_10_r8_one_rate"),
}
# The product's default ratio, 96 / hidden size and at most 1, by task: where it is not 1, it has a method of its own.
BY_DEFAULT = {"products_direct": "three_quarters_rate", "new_order_wide": "half_rate"}
# Heading -> tasks whose claims stand together.
GROUPS = {
    "Tasks on which the formulas were chosen": ("facts", "facts_deep", "products_direct"),
    "Tasks that neither chose": ("new_automaton", "new_order", "new_order_wide", "smollm2_codes"),
}


@dataclass(frozen=True)
class Point:
    """One method on one task."""

    method: str
    records: list[Record]
    memory: int | None  # bytes of tensors at the peak of training

    @property
    def by_seed(self) -> dict[int, float]:
        return {record.seed: record.accuracy for record in self.records}

    @property
    def accuracy(self) -> Estimate:
        return mean(list(self.by_seed.values()))

    @property
    def trained(self) -> float:
        return fmean(record.trainable_parameters for record in self.records)


Points = dict[str, Point]


def points_of(store: Store, task: str) -> Points:
    """What there is of a task.

    Raises:
        SystemExit: If runs of one seed began at different start policies.
    """
    memory = store.within(f"memory/{task}")
    found = {name: of_method(store, "frontier", task, name) for name in METHODS}
    policies: dict[int, str] = {}
    for record in (record for records in found.values() for record in records):
        same_policy(task, record.seed, policies.setdefault(record.seed, record.model_digest), record.model_digest)
    return {name: Point(name, records, memory.get(f"{name}.json", {}).get("bytes")) for name, records in found.items() if records}


def same_policy(task: str, seed: int, first: str, other: str) -> None:
    """Raise SystemExit unless these digests are of one start policy: what differs in it would be taken for the methods'."""
    if first != other:
        raise SystemExit(
            f"error: seed {seed} of {task} has runs from start policy {first}, and from or for {other}: one was made on another "
            "machine or version of PyTorch; take other seeds, or remove the runs from one of them"
        )


def tuned_ratios(store: Store, task: str) -> dict[str, str]:
    """For each rule of `RATIOS` the method with the fixed ratio that was best in the sweeps of a task, where all have one."""
    found: dict[str, str] = {}
    for rule, ratios in RATIOS.items():
        tuned = {ratio: means(of_method(store, "sweep", task, ratio)) for ratio in ratios}
        if all(tuned.values()):
            found[rule] = max(tuned, key=lambda ratio: max(tuned[ratio].values()))
    return found


def beside_others(points: Points) -> dict[str, Estimate]:
    """Accuracy of each method with an interval from which what all methods share is taken out: how good a seed's start policy is.

    Accuracies are moved by the difference of the seed's mean over methods to that of all seeds (Cousineau, 2005). These methods
    are those that have all seeds, so that one with fewer seeds stands where it would if they were as easy as all; where there
    are none, it is done over the seeds that all methods have.
    """
    seeds = {seed for point in points.values() for seed in point.by_seed}
    complete = [point for point in points.values() if point.by_seed.keys() == seeds]
    if not complete:
        complete, seeds = list(points.values()), set.intersection(*(set(point.by_seed) for point in points.values()))
    if not seeds:  # none that could be compared
        return {name: point.accuracy for name, point in points.items()}
    level = {seed: fmean(point.by_seed[seed] for point in complete) for seed in seeds}
    whole = fmean(level.values())
    moved = {
        name: {seed: value - level[seed] + whole for seed, value in point.by_seed.items() if seed in level}
        for name, point in points.items()
    }
    return {name: mean([values[seed] for seed in sorted(values)]) for name, values in moved.items()}


def line_at(points: Points, family: Sequence[str], trained: float) -> dict[int, float]:
    """Accuracy by seed of a family at a number of trained parameters, on straight lines between its members by its logarithm.

    Empty outside of them.
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
        found = {
            task: _less(points[ours].by_seed, points[theirs].by_seed)
            for task, points in tasks.items()
            if ours in points and theirs in points
        }
        yield f"{ours} less {theirs}", found
    for rule in RATIOS:
        found = {
            task: _less(points[ruled].by_seed, points[ratios[task][rule]].by_seed)
            for task, points in tasks.items()
            if (ruled := _at_rule(rule, task)) in points and ratios.get(task, {}).get(rule) in points
        }
        yield f"{rule} less the fixed ratio that tuning chose", found
    for family, words in ((LORA, "LoRA"), (MLPS, "LoRA on MLPs")):
        for name in BESIDE_LORA:
            found = {
                task: _less(points[name].by_seed, line_at(points, family, points[name].trained))
                for task, points in tasks.items()
                if name in points
            }
            yield f"{name} less {words} of its size", found


def _at_rule(rule: str, task: str) -> str:
    """The method whose ratio of rates a rule of `RATIOS` says for a task."""
    hybrids = {"default ratio": "hybrid", "default ratio beside rank 8": "hybrid_10_r8"}
    return f"{hybrids[rule]}_{BY_DEFAULT.get(task, 'one_rate')}" if rule in hybrids else rule


def _less(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}


def claims_table(tasks: Mapping[str, Points], ratios: Mapping[str, Mapping[str, str]]) -> str:
    """Every claim on every task that has its methods, and on the mean of these tasks.

    In bold what Holm's correction over all cells of the table leaves, at 5%.
    """
    rows: list[tuple[str, list[Difference]]] = []  # an empty cell was not run, or is larger or smaller than the line is long
    for name, found in _claims(tasks, ratios):
        there = [values for values in found.values() if values]
        common = set.intersection(*map(set, there)) if len(there) > 1 else ()
        over_tasks = {seed: fmean(values[seed] for values in there) for seed in common}
        if there:
            rows.append((name, [*(found.get(task, {}) for task in tasks), over_tasks]))
    kept = iter(holm([p_value(list(cell.values())) for _, cells in rows for cell in cells if cell]))

    def text(cell: Difference) -> str:
        if not cell:
            return "-"
        words = mean(list(cell.values())).text()
        return f"**{words}**" if next(kept) else words

    return markdown(("points", *tasks, "mean"), [(name, *map(text, cells)) for name, cells in rows])


def at_one_size(tasks: Mapping[str, Points]) -> str:
    """All tasks at the size of a hybrid of 10% beside rank 8: means over the seeds that all of a row have; empty without one."""
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


def points_table(points: Points) -> str:
    """The methods of a task by size."""
    rows = []
    for point in sorted(points.values(), key=lambda point: (point.trained, point.method)):
        gap = difference(point.by_seed, line_at(points, LORA, point.trained)) if point.method not in LORA else None
        closed = None
        if "lora_r4" in points and "fft" in points and point.method not in ("lora_r4", "fft"):
            closed = gap_closed(point.by_seed, points["lora_r4"].by_seed, points["fft"].by_seed)
        rows.append(
            (
                point.method,
                str(len(point.records)),
                f"{point.records[0].learning_rate:g}",
                f"{point.trained:,.0f}",
                "-" if point.memory is None else f"{point.memory / 2**20:.2f}",
                point.accuracy.text(),
                "-" if gap is None else gap.text(),
                "-" if closed is None else closed.text(digits=0),
            )
        )
    return markdown(
        ("method", "seeds", "rate", "trained", "peak, MiB", "accuracy %", "less LoRA of its size", "gap closed %"), rows
    )


def report(store: Store, tasks: Sequence[str], results: Path) -> None:
    """Write `frontier.md` and a `frontier_TASK.png` for each task into the folder of the results.

    Raises:
        SystemExit: If there are no runs.
    """
    found = {task: points for task in tasks if (points := points_of(store, task))}
    if not found:
        raise SystemExit(f"error: there are no runs of the frontier of {', '.join(tasks)}; make some with --seeds")
    parts = [
        "# Accuracy against trained parameters",
        "Made by `python -m benchmarks.study.frontier`. Points with intervals of 95% over seeds, each with a start policy of its "
        "own. *Peak* is the largest sum of all tensors in two steps of training. *LoRA of its size* lies on the line through the "
        "ranks that were run and full fine-tuning, *LoRA on MLPs of its size* on that through MLPs of the size of these ranks, "
        "with attention of rank 1, and full fine-tuning. *Gap closed* is that from LoRA of rank 4 to full fine-tuning; intervals "
        "have no ends where there may be none. In the figures what a seed's start policy adds to all methods is taken out; in "
        "the tables of the tasks it is in accuracies and their intervals, so that methods with other seeds are compared by "
        "differences, in which it cancels.",
        "In the tables of claims the mean is that of the tasks on which both methods were run, and in bold is what Holm's "
        "correction over all cells of the table leaves, at 5%.",
    ]
    if table := at_one_size(found):
        parts += [
            "## At the size of a hybrid",
            "Mean accuracy in percent at the size of 10% fully trained modules beside rank 8, by the default score, at one "
            "learning rate for both kinds of modules (on SmolLM2 at a sixth for the full ones). What is smaller, rank 4, and "
            "larger, FFT, is beside it. Intervals are those of the differences below.",
            table,
        ]
    ratios = {task: tuned_ratios(store, task) for task in found}
    others = tuple(task for task in found if not any(task in group for group in GROUPS.values()))
    for title, group in {**GROUPS, "Other tasks": others}.items():
        if there := {task: found[task] for task in group if task in found}:
            parts += [f"## {title}", claims_table(there, ratios)]
    for task, points in found.items():
        picture = f"![{task}: accuracy by trained parameters and by peak memory]({figure_name(task)})"
        parts += [f"## {task}", picture, points_table(points)]
    results.mkdir(parents=True, exist_ok=True)
    (results / "frontier.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    for task, points in found.items():
        draw(task, points, results / figure_name(task))


def figure_name(task: str) -> str:
    return f"frontier_{task}.png"


def draw(task: str, points: Points, out: Path) -> None:
    """Accuracy by trained parameters, and by peak memory; what shares a seed is compared, as `beside_others` says."""
    figure = Figure(figsize=(11.0, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    estimates = beside_others(points)
    _draw(left, points, estimates, "trained parameters", lambda point: point.trained)
    _draw(right, points, estimates, "peak of all tensors in training, MiB", _mebibytes)
    left.set_ylabel("accuracy on test problems, %")
    figure.suptitle(task)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(out, dpi=110)


def _mebibytes(point: Point) -> float:
    return math.nan if point.memory is None else point.memory / 2**20


def _draw(axes: Axes, points: Points, estimates: Mapping[str, Estimate], label: str, place: Callable[[Point], float]) -> None:
    for name, (family, colour, style) in LINES.items():
        there = sorted((points[method] for method in family if method in points), key=place)
        if not there:
            continue
        values = [estimates[point.method] for point in there]
        errors = [[100 * (v.value - v.low) for v in values], [100 * (v.high - v.value) for v in values]]
        axes.errorbar(
            [place(point) for point in there],
            [100 * value.value for value in values],
            errors,
            fmt=style,
            color=colour,
            label=name,
            markersize=5,
            elinewidth=0.7,
            linewidth=1.2,
        )
    axes.set(xlabel=label, xscale="log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 4 * low else MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
