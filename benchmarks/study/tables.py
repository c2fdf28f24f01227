"""The study's tables as Markdown."""

from collections.abc import Sequence
from statistics import fmean

from benchmarks.study.comparison import WANTED_GAIN, WANTED_GAP, Comparison, over_tasks
from benchmarks.study.estimates import Estimate, correlation
from benchmarks.study.methods import ALL
from benchmarks.tables import table

FEWEST_TO_CORRELATE = 5
CHANCE = ("random", "random_mlp")  # choices that a score has to beat: among all modules, and among those as large as its own


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table without columns of numbers; empty without rows."""
    return table(header, rows, left=len(header)) if rows else ""


def of_task(comparison: Comparison) -> str:
    """The result of each method, best first."""
    measured = ("accuracy %", "over LoRA, points", "over random, points", "gap closed %")
    rows = sorted(comparison.rows.values(), key=lambda row: -row.accuracy.value)
    cells = []
    for row in rows:
        over = comparison.over(row.method, "lora"), comparison.over_random(row.method)
        has_share = comparison.has_gap and row.method not in ("start", "lora", "fft")
        share = _text(comparison.gap_closed(row.method), digits=0) if has_share else "-"
        numbers = (str(row.accuracy.number), f"{row.rate:g}", f"{row.trained:,.0f}", row.accuracy.text())
        cells.append((row.method, *numbers, *map(_text, over), share))
    return markdown(("method", "seeds", "learning rate", "trained", *measured), cells)


def headline(comparisons: Sequence[Comparison]) -> str:
    """The methods that most people ask about, on every task."""
    names = ("start", "fft", "hybrid", "random", "lora", "dora", "rslora", "adalora")
    header = ("task", *names)
    rows = [
        (comparison.task, *(comparison.rows[name].accuracy.text() if name in comparison.rows else "-" for name in names))
        for comparison in comparisons
    ]
    return markdown(header, rows)


def choices(comparisons: Sequence[Comparison]) -> str:
    """The gain over LoRA of each way to choose 10% of the modules, in points, best first by the mean over tasks with a gap.

    Also the correlation with the number of trained parameters, since modules differ in size.
    """
    with_gap = [comparison for comparison in comparisons if comparison.has_gap]
    rows, sizes_and_gains = [], []
    for name in (method.name for method in ALL if method.name == "hybrid" or method.chooses):
        gained = [comparison.over(name, "lora") for comparison in comparisons]
        if any(gained):
            over_lora = over_tasks(with_gap, name, "lora")
            over_chance = [over_tasks(with_gap, name, other) if name != other else None for other in CHANCE]
            size = "-"
            if over_lora:
                relative = fmean(c.rows[name].trained / c.rows["hybrid"].trained for c in with_gap)
                sizes_and_gains.append((relative, over_lora.value))
                size = f"{relative:.2f}"
            cells = (name, *map(_text, (*gained, over_lora, *over_chance)), size)
            rows.append((over_lora.value if over_lora else -1.0, cells))
    means = ("where there is a gap", *(f"over {name} there" for name in CHANCE), "trained, of the hybrid's")
    header = ("10% chosen by", *(comparison.task for comparison in comparisons), *means)
    table = markdown(header, [cells for _, cells in sorted(rows, key=lambda row: -row[0])])
    if len(sizes_and_gains) < FEWEST_TO_CORRELATE:
        return table
    sizes, gains = zip(*sizes_and_gains, strict=True)
    agreement = correlation(sizes, gains).text(1, 2)
    return f"{table}\n\nRank correlation of what is gained where there is a gap and what is trained: {agreement}."


def differences(comparisons: Sequence[Comparison]) -> str:
    """The hybrid compared with the main alternatives, paired by seed, on each task and on average."""
    others = ("lora", "lora_r8", "lora_matched", "only_full", *CHANCE, "largest", "fft")
    pairs = [("hybrid", other) for other in others]
    pairs += [("hybrid_tuned_ratio", other) for other in ("hybrid", "lora_matched", "random_tuned_ratio", "fft")]
    pairs += [("random_mlp", "random"), ("only_full", "lora"), ("fft", "lora")]
    rows = []
    for ours, theirs in pairs:
        each = [over_tasks([comparison], ours, theirs) for comparison in comparisons]
        if each and all(each):
            rows.append((f"{ours} less {theirs}", *map(_text, (*each, over_tasks(comparisons, ours, theirs)))))
    return markdown(("points", *(comparison.task for comparison in comparisons), "mean of these"), rows)


def targets(comparisons: Sequence[Comparison]) -> str:
    """The project's goals, and the results."""
    with_gap = [comparison for comparison in comparisons if comparison.has_gap and "hybrid" in comparison.rows]
    rows = []
    for comparison in with_gap:
        gap = comparison.gap_closed("hybrid")
        assert gap is not None
        name = f"closes {WANTED_GAP:.0%} of the gap on {comparison.task}"
        rows.append((name, _text(gap, digits=0) + "%", _yes(gap.value >= WANTED_GAP)))
    gains = [gain for comparison in with_gap if (gain := comparison.relative_gain()) is not None]
    if gains:
        average = sum(gains) / len(gains)
        each = ", ".join(f"{gain:+.1%}" for gain in gains)
        name = f"beats the best of LoRA, DoRA, rsLoRA and AdaLoRA by {WANTED_GAIN:.2%} on average of the tasks with a gap"
        rows.append((name, f"{average:+.1%} ({each})", _yes(average >= WANTED_GAIN)))
    if over_random := over_tasks(with_gap, "hybrid", "random"):
        name = "beats a random choice on average of the tasks with a gap, the interval without zero"
        rows.append((name, _text(over_random) + " points", _yes(over_random.low > 0)))
    for comparison in comparisons:
        if comparison.has_gap and (over := comparison.over_random("hybrid")):
            name = f"beats a random choice on {comparison.task}, the interval without zero"
            rows.append((name, _text(over) + " points", _yes(over.low > 0)))
        if over := comparison.over("hybrid", "lora"):
            name = f"is not significantly worse than LoRA on {comparison.task}"
            rows.append((name, _text(over) + " points", _yes(not over.high < 0)))
    return markdown(("the hybrid at 10%", "measured", "reached"), rows)


def _text(estimate: Estimate | None, digits: int = 1) -> str:
    return "-" if estimate is None else estimate.text(digits=digits)


def _yes(reached: bool) -> str:
    return "yes" if reached else "**no**"
