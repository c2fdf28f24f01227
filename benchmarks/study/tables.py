"""The study's tables as Markdown."""

from collections.abc import Sequence

from benchmarks.study.comparison import RATIO_TUNED, WANTED_GAIN, WANTED_GAP, Comparison, Row, over_tasks
from benchmarks.study.estimates import Estimate
from benchmarks.study.methods import METHODS


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def of_task(comparison: Comparison) -> str:
    """What each method reached, best first."""
    header = (
        "method",
        "seeds",
        "learning rate",
        "trained",
        "accuracy %",
        "over LoRA, points",
        "over random, points",
        "gap closed %",
    )
    rows = sorted(comparison.rows.values(), key=lambda row: -row.accuracy.value)
    return markdown(header, [_row(row, comparison.has_gap) for row in rows])


def _row(row: Row, has_gap: bool) -> tuple[str, ...]:
    return (
        row.method,
        str(row.accuracy.number),
        f"{row.learning_rate:g}",
        f"{row.trainable:,.0f}",
        row.accuracy.text(),
        _text(row.over_lora) if row.method != "lora" else "-",
        _text(row.over_random) if row.method != "random" else "-",
        _text(row.gap, digits=0) if has_gap and row.method not in ("start", "lora", "fft") else "-",
    )


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
    """What each way to choose 10% of the modules gains over LoRA, in points, best first by the mean over tasks with a gap."""
    with_gap = [comparison for comparison in comparisons if comparison.has_gap]
    rows = []
    for name, method in METHODS.items():
        if name != "hybrid" and not method.chooses:
            continue
        gained = [row.over_lora if (row := comparison.rows.get(name)) else None for comparison in comparisons]
        if any(gained):
            over_lora = over_tasks(with_gap, name, "lora")
            over_random = over_tasks(with_gap, name, "random") if name != "random" else None
            cells = (name, *map(_text, (*gained, over_lora, over_random)))
            rows.append((over_lora.value if over_lora else -1.0, cells))
    header = ("10% chosen by", *(comparison.task for comparison in comparisons), "where there is a gap", "over random there")
    return markdown(header, [cells for _, cells in sorted(rows, key=lambda row: -row[0])])


def ratios(comparisons: Sequence[Comparison]) -> str:
    """The hybrid where the ratio of its two rates is fixed, is 1, or is tuned; each beside a random choice treated alike."""
    hybrids, randoms = RATIO_TUNED.values()
    variants = dict(zip(("0.3", "1", "the task's"), zip(hybrids, randoms, strict=True), strict=True)) | {
        "tuned": tuple(RATIO_TUNED)
    }
    with_gap = [comparison for comparison in comparisons if comparison.has_gap]
    rows = []
    for ratio, (ours, chance) in variants.items():
        for comparison in with_gap:
            row, other = comparison.rows.get(ours), comparison.rows.get(chance)
            if row is None or other is None:
                continue
            gain = comparison.relative_gain(ours)
            over_chance = over_tasks([comparison], ours, chance)
            over_best = "-" if gain is None else f"{gain:+.1%}"
            cells = (row.accuracy.text(), _text(row.gap, digits=0), over_best, _text(over_chance))
            rows.append((ratio, comparison.task, *cells))
        if over_chance := over_tasks(with_gap, ours, chance):
            rows.append((ratio, "mean of these", "-", "-", "-", _text(over_chance)))
    header = ("ratio", "task", "accuracy %", "gap closed %", "over the best baseline", "over random, points")
    return markdown(header, rows)


def targets(comparisons: Sequence[Comparison]) -> str:
    """What the project set out to reach, and what it did."""
    with_gap = [comparison for comparison in comparisons if comparison.has_gap and "hybrid" in comparison.rows]
    rows = []
    for comparison in with_gap:
        gap = comparison.rows["hybrid"].gap
        assert gap is not None
        rows.append(
            (
                f"closes {WANTED_GAP:.0%} of the gap on {comparison.task}",
                _text(gap, digits=0) + "%",
                _yes(gap.value >= WANTED_GAP),
            )
        )
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
        hybrid = comparison.rows.get("hybrid")
        if hybrid is None:
            continue
        if hybrid.over_random is not None and comparison.has_gap:
            name = f"beats a random choice on {comparison.task}, the interval without zero"
            rows.append((name, _text(hybrid.over_random) + " points", _yes(hybrid.over_random.low > 0)))
        if hybrid.over_lora is not None:
            name = f"is not significantly worse than LoRA on {comparison.task}"
            rows.append((name, _text(hybrid.over_lora) + " points", _yes(not hybrid.over_lora.high < 0)))
    return markdown(("the hybrid at 10%", "measured", "reached"), rows)


def _text(estimate: Estimate | None, digits: int = 1) -> str:
    return "-" if estimate is None else estimate.text(digits=digits)


def _yes(reached: bool) -> str:
    return "yes" if reached else "**no**"
