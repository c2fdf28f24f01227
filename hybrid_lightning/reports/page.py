"""Pages about runs: HTML with inline style and curves (SVG), without scripts or network access.

`report_page` shows one run; `compare_runs.py` puts several runs on one page from the same parts. All text from a run is escaped,
since a completion may contain anything.
"""

import base64
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from hybrid_lightning.adapters import AdapterPlan
from hybrid_lightning.adapters.plan_display import plan_rows, plan_title
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.metrics import LOWER, UPPER, Difference
from hybrid_lightning.reports.verdict import GREEDY, REWARD, compare_validations, shown_difference

REPORT = "report.json"
Curve = tuple[list[int], list[float]]  # steps and values
_MARKS = {True: "<span class=right>right</span> ", False: "<span class=wrong>wrong</span> ", None: ""}
_POINTS = 300  # drawn points of a curve; more points are averaged
_STYLE = """
:root{color-scheme:light dark;--ink:#1c1e21;--faint:#5d6670;--page:#fff;--box:#f5f6f8;--line:#d5d9de;--good:#17743a;--bad:#b3261e;
--c0:#0b62b8;--c1:#c2410c;--c2:#0f7b5f;--c3:#8b3fa8;--c4:#8a6100;--c5:#3d4a57}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8ea;--faint:#a0a8b0;--page:#15181b;--box:#1f2327;--line:#3a4047;--good:#5fd08a;
--bad:#ff8a80;--c0:#6cb2ff;--c1:#ff9d5c;--c2:#4fd1ab;--c3:#d59bf0;--c4:#e3b341;--c5:#b6c2cf}}
*{box-sizing:border-box}body{margin:0 auto;padding:16px;max-width:1240px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.35rem;margin:.2em 0}h2{font-size:1.1rem;margin:1.8em 0 .5em;border-bottom:1px solid var(--line)}
.scroll{overflow-x:auto;max-width:100%}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:4px 14px 4px 0;border-bottom:1px solid var(--line);overflow-wrap:normal}
th{color:var(--faint);font-weight:600}.charts,.pairs{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr))}
.pairs{grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr))}figure{margin:0;background:var(--box);border-radius:6px;padding:8px}
figcaption{font-weight:600;font-size:.9rem}svg{width:100%;height:auto;display:block}svg text{fill:var(--faint);font-size:11px}
svg .grid{stroke:var(--line)}svg path{fill:none;stroke-width:1.8}svg .band{stroke:none;opacity:.16}
pre{white-space:pre-wrap;background:var(--box);border-radius:6px;padding:8px;margin:4px 0;font:13px/1.45 ui-monospace,monospace}
figure pre{background:var(--page)}details{margin:8px 0}
summary{cursor:pointer}img{max-width:100%;height:auto;background:#fff;border-radius:6px}
.faint{color:var(--faint)}.right{color:var(--good);font-weight:600}.wrong{color:var(--bad);font-weight:600}
""" + "".join(
    f".s{n}{{stroke:var(--c{n})}}.s{n}.dot,.s{n}.band{{fill:var(--c{n})}}.t{n}{{color:var(--c{n});font-weight:600}}"
    f".s{n}.path{{stroke-dasharray:{dash}}}"
    for n, dash in enumerate(("none", "7 3", "2 3", "9 3 2 3", "4 2", "1 2"))
)


class Html(str):
    """Text that is HTML already."""


@dataclass(frozen=True)
class ReportedRun:
    """The contents of a run folder."""

    folder: Path
    report: dict[str, Any]  # report.json
    summary: dict[str, Any] | None  # summary.json of a finished run

    @classmethod
    def read(cls, folder: Path) -> "ReportedRun":
        """Read a run folder.

        Raises:
            ConfigError: If it does not exist, does not belong to a run that has begun, or cannot be read.
        """
        if not folder.is_dir():
            raise ConfigError(f"{folder} is not a folder; {_instead_of(folder)}")
        if not (folder / REPORT).is_file():
            raise ConfigError(f"{folder} has no {REPORT}, which fit writes from its first validation on; {_instead_of(folder)}")
        report = _read(folder / REPORT)
        done = report["state"] == "finished" and (folder / "summary.json").is_file()
        return cls(folder, report, _read(folder / "summary.json") if done else None)

    @property
    def state(self) -> str:
        """The run's state, and its step."""
        steps = f" of {self.report['max_steps']}" if self.report["max_steps"] > 0 else ""
        return f"{self.report['state']} (step {self.report['step']}{steps})"

    @property
    def measures(self) -> dict[str, str]:
        """Criteria for a run: displayed name -> metric."""
        found = {name: f"accuracy ({name.removeprefix('val/')})" for name in self.curves if re.fullmatch(r"val/avg@\d+", name)}
        found |= {REWARD: "reward", GREEDY: "greedy accuracy", "val/loss": "held-out loss"}
        found["val/rewards/accuracies"] = "preferred as chosen"
        return {label: name for name, label in found.items() if name in self.curves}

    @property
    def curves(self) -> dict[str, Curve]:
        """Metric -> steps and values."""
        return {name: (steps, values) for name, (steps, values) in self.report["curves"].items()}

    @property
    def trainable(self) -> int | None:
        """Number of trained parameters; None if neither the summary nor the plan has it."""
        if self.summary is not None:
            return int(self.summary["trainable_parameters"])
        return None if self.plan is None else self.plan.trainable_parameters()

    @property
    def plan(self) -> AdapterPlan | None:
        """The plan, if there is one."""
        return AdapterPlan.load(self.folder / "plan.json") if (self.folder / "plan.json").is_file() else None

    def value(self, metric: str, place: int) -> str:
        """The first (0) or last (-1) value of a metric in words, with its interval, if any, and its step."""
        if metric not in self.curves:
            return "-"
        step, value = (side[place] for side in self.curves[metric])
        ends = [self.curves[f"{metric}/{end}"][1][place] for end in (LOWER, UPPER) if f"{metric}/{end}" in self.curves]
        interval = f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]" if ends else ""
        plain = metric in (REWARD, "val/loss")
        return f"{value:.4f} at step {step}" if plain else f"{100 * value:.1f}%{interval} at step {step}"

    def change(self) -> dict[str, str]:
        """The change of each of `measures` from the first to the last validation, in words."""
        if self.report["first"] is None or self.report["first"]["step"] == self.report["last"]["step"]:
            return {}
        sides = self.report["first"], self.report["last"]
        found = {name: (metric, compare_validations(*sides, metric)) for name, metric in self.measures.items()}
        return {name: shown_comparison(change, metric, True) for name, (metric, change) in found.items() if change}


def _instead_of(folder: Path) -> str:
    """The remedy for a folder without a report: the latest run that has one, in this folder, beside it or in `runs`."""
    places = (folder, folder.parent, Path("runs"))
    found = [[*place.glob(f"*/{REPORT}"), *place.glob(f"*/*/{REPORT}")] for place in places]
    reports = next(filter(None, found), [])
    latest = max(reports, key=lambda path: path.stat().st_mtime, default=None)
    return "give the folder of a run" if latest is None else f"give a run folder such as {latest.parent}"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; give the folder of another run") from error


def shown_comparison(change: Difference, metric: str, paired: bool) -> str:
    """A difference with its interval, and the number of problems that it is based on."""
    return f"{shown_difference(change, metric)}, {f'paired over {change.problems} problems' if paired else 'unpaired'}"


# ---- one run


def report_page(run: ReportedRun) -> str:
    """The page about one run."""
    report, summary, plan = run.report, run.summary, run.plan
    verdict = (summary or {}).get("verdict", "")
    parts = [Html(f"<p><b>{escape(verdict)}</b> {escape(run.state)}</p>"), result_table([run], results([run]))]
    parts += [Html(f"<p>Try: {escape(advice)}</p>") for advice in (summary or {}).get("try", ())]
    if report["commands"]:
        parts += [Html("<h2>Next</h2>"), *(Html(f"<pre>{escape(command)}</pre>") for command in report["commands"])]
    parts += [Html("<h2>Curves</h2>"), charts([run])]
    if report["first"] and report["first"]["samples"]:
        parts += [Html("<h2>Samples, before and after</h2>"), _samples(report["first"], report["last"])]
    if plan is not None:
        parts += [Html(f"<h2>Plan</h2><p>{escape(plan_title(plan))}</p>"), _heat_map(run.folder / "plan.png")]
        parts += [folded("All modules by score", table(*plan_rows(plan)))]
    if summary is not None and summary["validation"]["after"]:
        parts += [Html("<h2>Validation</h2>"), folded("All metrics", _validation(summary["validation"]))]
    changed = [(name, shown_value(value), shown_value(default)) for name, (value, default) in report["changed"].items()]
    parts += [Html("<h2>Options that differ from their defaults</h2>"), table(("option", "value", "default"), changed)]
    parts += [Html("<h2>Machine</h2>"), table((), report["machine"].items())]
    return page(f"Run {run.folder}", parts)


def result_table(runs: Sequence[ReportedRun], rows: Sequence[Sequence[str]]) -> Html:
    """The results, one column per run."""
    return table(("", *(_marked(number, run) for number, run in enumerate(runs))) if len(runs) > 1 else (), rows)


def results(runs: Sequence[ReportedRun]) -> list[tuple[str, ...]]:
    """The results as rows: the name, and its value in each run."""
    labels = {label: name for run in runs for label, name in run.measures.items()}
    rows: list[tuple[str, ...]] = []
    for label, name in labels.items():
        rows.append((f"{label}, first", *(run.value(name, 0) for run in runs)))
        rows.append((f"{label}, last", *(run.value(name, -1) for run in runs)))
        changes = [run.change().get(label, "-") for run in runs]
        if any(change != "-" for change in changes):
            rows.append((f"{label}, change", *changes))
    rows.append(("trained parameters", *(f"{run.trainable:,}" if run.trainable is not None else "-" for run in runs)))
    rows.append(("seconds", *(_seconds(run) for run in runs)))
    rows.append(("peak memory", *(", ".join(f"{n} {v:.2f} GiB" for n, v in run.report["peak_gib"].items()) for run in runs)))
    return rows


def _seconds(run: ReportedRun) -> str:
    total, phases = run.report["seconds"], (run.summary or {}).get("seconds_by_phase", {})
    parts = ", ".join(f"{name} {value:.0f}" for name, value in phases.items() if value >= 0.5)
    return "-" if total is None else f"{total:.0f}" + (f" ({parts})" if parts else "")


def _samples(first: Mapping[str, Any], last: Mapping[str, Any]) -> Html:
    found = []
    for before, after in zip(first["samples"], last["samples"], strict=False):
        sides = [(first["step"], before)] + ([(last["step"], after)] if last["step"] != first["step"] else [])
        told = "".join(
            f"<div><span class=faint>step {step}</span> {_MARKS[side['correct']]}"
            f"{_paid(side['reward'])}{'' if side['finished'] else ', cut'}"
            f"<pre>{escape(side['completion'])}</pre></div>"
            for step, side in sides
        )
        answer = "" if before["answer"] is None else f"<p class=faint>reference answer: {escape(str(before['answer']))}</p>"
        found.append(f"<figure><pre>{escape(before['prompt'])}</pre>{answer}<div class=pairs>{told}</div></figure><br>")
    return Html("".join(found))


def _paid(reward: float | None) -> str:
    return "left out" if reward is None else f"reward {reward:.3g}"


def _heat_map(path: Path) -> Html:
    if not path.is_file():
        return Html("")
    text = "Scores by layer and kind of module; frames are fully trained modules"
    return Html(f'<img alt="{text}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">')


def _validation(of_runs: Mapping[str, Mapping[str, float | None]]) -> Html:
    rows = []
    for name in of_runs["after"]:
        if not name.endswith((f"/{LOWER}", f"/{UPPER}")):
            values = (of_runs[when].get(name) for when in ("before", "after"))
            rows.append((name, *("-" if value is None else f"{value:.4g}" for value in values)))
    return table(("metric", "before", "after"), rows)


# ---- parts of pages


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page; `parts` are HTML."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """A table that scrolls in its own box; cells that are not `Html` are escaped."""
    head = f"<tr>{''.join(f'<th>{_cell(cell)}</th>' for cell in header)}</tr>" if header else ""
    body = "".join(f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return Html(f'<div class=scroll tabindex=0 role=region aria-label="table"><table>{head}{body}</table></div>')


def folded(title: str, content: str) -> Html:
    """HTML that opens with a click."""
    return Html(f"<details><summary>{escape(title)}</summary>{content}</details>")


def charts(runs: Sequence[ReportedRun]) -> Html:
    """A chart of each metric, with the curves of all runs that have it."""
    return Html(f"<div class=charts>{''.join(_chart(name, runs) for name in charted(runs))}</div>")


def charted(runs: Sequence[ReportedRun]) -> list[str]:
    """The metrics with a chart."""
    return list(dict.fromkeys(name for run in runs for name in run.curves if not name.endswith((f"/{LOWER}", f"/{UPPER}"))))


def letter(number: int) -> str:
    """The short name of a run: A, B, ..."""
    return chr(ord("A") + number) if number < 26 else str(number)


def _marked(number: int, run: ReportedRun) -> Html:
    return Html(f"<span class=t{number % 6}>{letter(number)}</span> {escape(str(run.folder))}")


def shown_value(value: Any) -> str:
    """A value of an option; our classes by name."""
    if isinstance(value, Mapping) and "class_path" in value:
        value = value["class_path"]
    if isinstance(value, str):
        return value.rpartition(".")[2] if value.startswith("hybrid_lightning.") else value
    return json.dumps(value, ensure_ascii=False)


def _cell(cell: str) -> str:
    return cell if isinstance(cell, Html) else escape(str(cell))


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 190, 50, 10, 8, 22  # of a chart, in its own units


def _chart(name: str, runs: Sequence[ReportedRun]) -> str:
    curves = {number: thinned(run.curves[name]) for number, run in enumerate(runs) if name in run.curves}
    bands = {
        number: [thinned(run.curves[f"{name}/{end}"]) for end in (LOWER, UPPER)]
        for number, run in enumerate(runs)
        if number in curves and f"{name}/{UPPER}" in run.curves and len(runs) == 1
    }
    points = [point for curve in (*curves.values(), *(side for band in bands.values() for side in band)) for point in curve]
    if not points:
        return f"<figure><figcaption>{escape(name)}</figcaption>no finite value</figure>"
    (left, right), (low, high) = ((min(side), max(side)) for side in zip(*points, strict=True))
    low, high = (low, high) if high > low else (low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10)

    def place(step: float, value: float) -> tuple[float, float]:
        x = _LEFT + (step - left) / ((right - left) or 1) * (_WIDTH - _LEFT - _RIGHT)
        return round(x, 1), round(_TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM), 1)

    def line(curve: Iterable[tuple[float, float]]) -> str:
        return "L".join(f"{x} {y}" for x, y in (place(*point) for point in curve))

    drawn = []
    for value in _ticks(low, high):
        y = place(left, value)[1]
        drawn.append(f'<path class=grid d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>')
        drawn.append(f"<text x={_LEFT - 5} y={y + 4} text-anchor=end>{value:.4g}</text>")
    for step, anchor in ((left, "start"), (right, "end")):
        drawn.append(f"<text x={place(step, low)[0]} y={_HEIGHT - 6} text-anchor={anchor}>{step:.0f}</text>")
    drawn.append(f"<text x={(_WIDTH + _LEFT) / 2} y={_HEIGHT - 6} text-anchor=middle>step</text>")
    drawn += [f'<path class="s{n} band" d="M{line(lower)}L{line(upper[::-1])}Z"/>' for n, (lower, upper) in bands.items()]
    for number, curve in curves.items():
        drawn.append(f'<path class="s{number % 6} path" d="M{line(curve)}"/>')
        for step, value in curve if len(curve) <= 40 else ():
            x, y = place(step, value)
            told = f"step {step:.0f}: {value:.4g}"
            drawn.append(f'<circle class="s{number % 6} dot" cx={x} cy={y} r=2.5><title>{told}</title></circle>')
    last = ", ".join(f"{letter(n) + ' ' if len(runs) > 1 else ''}{curve[-1][1]:.4g}" for n, curve in curves.items() if curve)
    title = f"{name}, last {last}"
    return (
        f"<figure><figcaption>{escape(name)} <span class=faint>{escape(last)}</span></figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role=img aria-label="{escape(title)}">{"".join(drawn)}</svg></figure>'
    )


def thinned(curve: Curve, most: int = _POINTS) -> list[tuple[float, float]]:
    """The finite points of a curve; more than `most` points are averaged in equal runs of neighbours."""
    points = [(float(step), value) for step, value in zip(*curve, strict=True) if math.isfinite(value)]
    size = -(-len(points) // most)
    parts = [points[start : start + size] for start in range(0, len(points), size or 1)]
    return [(sum(p[0] for p in part) / len(part), sum(p[1] for p in part) / len(part)) for part in parts]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, at most six."""
    unit = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(unit * by for by in (1, 2, 5, 10) if (high - low) / (unit * by) <= 5)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
