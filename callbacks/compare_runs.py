"""`compare`: shows how several runs differ and what each achieved, as text and as a page."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from hybrid_lightning.callbacks.display import say, show_table
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.reports.page import (
    Html,
    ReportedRun,
    charted,
    charts,
    letter,
    page,
    result_table,
    results,
    shown_comparison,
    shown_value,
    table,
    thinned,
)
from hybrid_lightning.reports.verdict import compare_validations

_BLOCKS = "▁▂▃▄▅▆▇█"
_COLUMNS = 40  # width of a curve as text


def compare(folders: Sequence[str], html: str | None = None) -> None:
    """Print how runs differ: options, accuracies and rewards (paired where the problems are the same), sizes, times and curves.

    Args:
        folders: At least two run folders. Each other run is compared with the first one.
        html: A new file for the same comparison as a page; None writes no page.

    Raises:
        ConfigError: If there are fewer than two folders, if a folder does not hold a run that has begun, or if `html` exists or
            cannot be written.
    """
    if len(folders) < 2:
        raise ConfigError(
            "compare needs at least two run folders; give them, as in compare runs/gspo/version_0 runs/gspo/version_1"
        )
    if html is not None and (Path(html).exists() or not Path(html).absolute().parent.is_dir()):
        problem = "it exists" if Path(html).exists() else "its folder does not exist"
        raise ConfigError(f"--html={html}: {problem}; give a new file")
    runs = [ReportedRun.read(Path(folder)) for folder in folders]
    letters, options = [letter(number) for number in range(len(runs))], differing_options(runs)
    rows = [("state", *(run.state for run in runs)), ("verdict", *((run.summary or {}).get("verdict") or "-" for run in runs))]
    rows += [*results(runs), *differences(runs)]
    for name, run in zip(letters, runs, strict=True):
        say(f"{name}  {run.folder}")
    _show("Results", ("", *letters), rows)
    for note in (notes := notes_on(runs, options)):
        say(note)
    _show("Options that differ", ("option", *letters), options) if options else say("No option differs")
    for name in charted(runs):
        curves = text_curves(name, runs)
        if len({value for _, curve, _ in curves for _, value in curve}) < 2:  # the same everywhere
            continue
        say(f"\n{name}")
        for number, curve, line in curves:
            say(f"  {letters[number]}  {line}  {curve[0][1]:.4g} -> {curve[-1][1]:.4g}")
    if html is not None:
        parts = [result_table(runs, rows), *(Html(f"<p>{note}</p>") for note in notes), Html("<h2>Options that differ</h2>")]
        parts += [table(("option", *letters), options), Html("<h2>Curves</h2>"), charts(runs)]
        with open(html, "x", encoding="utf-8") as file:
            file.write(page("Runs compared", parts))
        say(f"\nWritten to {html}")


def differences(runs: Sequence[ReportedRun]) -> list[tuple[str, ...]]:
    """Rows with each run's accuracy and reward at its last validation, as differences from the first run, with intervals."""
    rows, first = [], runs[0]
    for label, name in first.measures.items():
        same = [_same(first, run) for run in runs[1:]]
        pairs = zip(runs[1:], same, strict=True)
        found = [compare_validations(first.report["last"], run.report["last"], name, paired) for run, paired in pairs]
        if any(found):
            shown = (shown_comparison(one, name, paired) if one else "-" for one, paired in zip(found, same, strict=True))
            rows.append((f"{label}, difference to A", "", *shown))
    return rows


def notes_on(runs: Sequence[ReportedRun], options: Sequence[tuple[str, ...]]) -> list[str]:
    """What to know when reading the numbers of runs that differ in these options."""
    notes = []
    if not all(_same(runs[0], run) for run in runs):
        notes.append("Validation problems differ: accuracies are of different problems, and intervals are unpaired")
    if any(name.startswith("model.reward") for name, *_ in options):
        notes.append("Rewards differ, so a right answer may mean something else in each run")
    if any(run.report["state"] != "finished" for run in runs):
        notes.append("Some runs are not finished: their columns show the last report that they wrote")
    return notes


def differing_options(runs: Sequence[ReportedRun]) -> list[tuple[str, ...]]:
    """Rows with the options that differ between runs; options of a logger or strategy that only some runs have are left out."""
    settings = [run.report["settings"] for run in runs]
    names = dict.fromkeys(name for found in settings for name in found)
    rows = ((name, *(shown_value(found[name]) if name in found else "-" for found in settings)) for name in names)
    return [row for row in rows if len(set(row[1:])) > 1 and not (row[0].startswith("trainer.") and "-" in row[1:])]


def text_curves(name: str, runs: Sequence[ReportedRun]) -> list[tuple[int, list[tuple[float, float]], str]]:
    """The curves of a metric as text on shared axes: the run's number, its points, and one character for each interval."""
    curves = {number: points for number, run in enumerate(runs) if (points := thinned(run.curves.get(name, ([], []))))}
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return []
    (first, end), (low, high) = ((min(side), max(side)) for side in zip(*points, strict=True))
    found = []
    for number, curve in curves.items():
        steps, known = zip(*curve, strict=True)
        values = np.interp(np.linspace(first, end, _COLUMNS), steps, known, math.nan, math.nan)  # nothing outside the run
        heights = (8 * (values - low) / ((high - low) or 1)).tolist()
        line = "".join(" " if math.isnan(height) else _BLOCKS[min(7, int(height))] for height in heights)
        found.append((number, curve, line))
    return found


def _same(first: ReportedRun, other: ReportedRun) -> bool:
    """Whether two runs were validated on the same problems."""
    known = first.report["settings"]["validation prompts"]
    return known is not None and known == other.report["settings"]["validation prompts"]


def _show(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    shown = Table(*head, title=title, title_justify="left")
    for row in rows:
        shown.add_row(*row)
    show_table(shown)
