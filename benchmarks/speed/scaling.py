"""Measures how the time of a training step grows with its sizes: `python -m benchmarks.speed.scaling`.

Prints tables, and writes all measurements as JSON. benchmarks/README.md explains the numbers.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import correlation, linear_regression
from typing import Any

from benchmarks.commands import CORES, UsageError, about, check_at_least, check_can_run, command, entry, tell
from benchmarks.pairs import Job, Plan, prepared, take_turns
from benchmarks.tables import shown, spread, table, yes
from benchmarks.workloads import SMOLLM2, WORKLOADS, Workload

SAME = ("trainable_parameters", "threads", "device")
SIZES = {"completion-tokens": [16, 32, 64, 128], "samples": [2, 4, 8, 16], "prompt-tokens": [32, 64, 128, 256, 512]}
# Limits for linear growth. A large R^2 alone is not enough: over a few sizes a line also explains much of x^1.5.
WANTED_R2 = 0.98
LARGEST_EXPONENT = 1.1


@dataclass(frozen=True)
class Series:
    """Workloads that differ in only one size."""

    name: str
    label: str  # of the size
    points: tuple[tuple[int, Workload], ...]  # x, and what is measured there
    linear: bool  # whether a straight line is wanted, or else less growth than separate sequences would have


def build_parser() -> argparse.ArgumentParser:
    where = {"device": "cpu", "threads": CORES, "seed": 0, "model": SMOLLM2, "out": Path("runs/scaling")}
    parser = command("speed.scaling", __doc__, rounds=3, **where)
    for name, values in SIZES.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", default=values, help="sizes to measure (default: %(default)s)")
    names, sizes = ("PROMPT", "SAMPLES", "COMPLETION"), [128, 8, 64]
    told = "sizes while another is varied; prompts are varied with the shortest completion (default: %(default)s)"
    parser.add_argument("--fixed", type=int, nargs=3, default=sizes, metavar=names, help=told)
    parser.add_argument("--prompts", type=int, default=1, help="of a rollout (default: %(default)s)")
    return parser


def check(arguments: argparse.Namespace) -> None:
    check_at_least(arguments, 1, "rounds", "threads", "prompts", "completion-tokens", "prompt-tokens", "fixed")
    check_at_least(arguments, 2, "samples")  # or no completion would differ from the mean of its group
    if arguments.fixed[1] < 2:
        raise UsageError(f"--fixed needs at least 2 samples of a prompt, got {arguments.fixed[1]}")
    for option in SIZES:
        values = getattr(arguments, option.replace("-", "_"))
        if len(values) < 3 or values != sorted(set(values)):
            raise UsageError(f"--{option} needs at least 3 sizes, all different, smallest first, got {values}")
    check_can_run([arguments.model], "give another --model, as embedded", arguments.device)


def all_series(arguments: argparse.Namespace) -> list[Series]:
    """All series. The prompt length is varied with short completions, so that prompts are a large part of the work."""
    prompt, samples, completion = arguments.fixed
    sizes = {"prompts": arguments.prompts, "prompt_tokens": prompt, "samples": samples}
    base = replace(WORKLOADS["main"], model=arguments.model, **sizes)
    short = arguments.completion_tokens[0]
    completions = [(n, full_length(base, n, name=f"completion_{n}")) for n in arguments.completion_tokens]
    groups = [(n, full_length(base, completion, name=f"samples_{n}", samples=n)) for n in arguments.samples]
    lengths = arguments.prompt_tokens
    prompts = [(n * samples, full_length(base, short, name=f"prompt_{n}", prompt_tokens=n)) for n in lengths]
    return [
        Series("completion", f"completion tokens (G = {samples}, prompt {prompt})", tuple(completions), linear=True),
        Series("samples", f"G (completion {completion}, prompt {prompt})", tuple(groups), linear=True),
        Series("prompt", f"prompt tokens x G (G = {samples}, completion {short})", tuple(prompts), linear=False),
    ]


def full_length(base: Workload, tokens: int, **sizes: Any) -> Workload:
    """The workload with completions of exactly this many tokens."""
    return replace(base, max_new_tokens=tokens, mean_tokens=tokens, **sizes)


def run(arguments: argparse.Namespace) -> None:
    """Measure all series. Each finished series is written immediately."""
    check(arguments)
    plan, series, path = Plan.of(arguments, ("ours",), same=SAME), all_series(arguments), arguments.out / "scaling.json"
    results: dict[str, dict[str, Any]] = {}
    lengths = {workload.prompt_tokens: workload for one in series for _, workload in one.points}  # all else is the same
    with prepared(list(lengths.values()), plan) as made:
        folders = dict(zip(lengths, made, strict=True))
        for one in series:
            tell(f"loading the model {len(one.points)} times")
            jobs: list[Job] = [("ours", workload, folders[workload.prompt_tokens]) for _, workload in one.points]
            results[one.name] = summarize(one, take_turns(jobs, plan)[1])
            content = {**about(arguments), "series": results}
            path.write_text(json.dumps(content, indent=1))
    print(tables(results))
    print(f"\nWritten: {path}")


def tokens(workload: Workload, shared: bool) -> float:
    """Tokens in a rollout's forward and backward pass.

    P G (prompt + T) if every completion is a sequence of its own, P (prompt + G T) if prompts are shared.
    """
    assert workload.prompt_tokens is not None
    prompts = workload.prompts if shared else workload.rows
    return float(prompts * workload.prompt_tokens + workload.rows * workload.max_new_tokens)


def exponent(x: list[float], y: list[float]) -> float:
    """The b of y = a x^b, by least squares of the logarithms."""
    return linear_regression([math.log(value) for value in x], [math.log(value) for value in y]).slope


def summarize(series: Series, steps: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """The points of a series, the fit, and whether it reaches the goal; warm-ups do not count."""
    x = [float(size) for size, _ in series.points]
    spreads = [spread([step["seconds"] for step in done[1:]]) for done in steps]
    seconds = [found["median"] for found in spreads]
    slope, intercept = linear_regression(x, seconds)
    naive, shared = ([tokens(workload, shared) for _, workload in series.points] for shared in (False, True))
    result: dict[str, Any] = {
        "label": series.label,
        "linear": series.linear,
        "x": x,
        "seconds": spreads,
        "settings": [asdict(workload) for _, workload in series.points],
        "steps": steps,
        "line": {"slope": slope, "intercept": intercept, "r2": correlation(x, seconds) ** 2},  # least squares
        "exponent": exponent(x, seconds),
        "growth": seconds[-1] / seconds[0],  # from the first to the last point
        "naive_tokens": naive,
        "naive_exponent": exponent(x, naive),
        "naive_growth": naive[-1] / naive[0],
        "shared_tokens": shared,
    }
    # On a line, or else with a smaller exponent than separate sequences, which already have one below 1.
    fits = result["line"]["r2"] >= WANTED_R2 and 0 < result["exponent"] <= LARGEST_EXPONENT
    result["reached"] = fits if series.linear else result["exponent"] < result["naive_exponent"]
    return result


def tables(results: dict[str, dict[str, Any]]) -> str:
    """Tables with the seconds at every point, and the fits."""
    points, fits = [], []
    for name, result in results.items():
        for x, seconds, *counts in zip(*(result[key] for key in ("x", "seconds", "naive_tokens", "shared_tokens")), strict=True):
            points.append([name, f"{x:.0f}", shown(seconds), *(f"{number:.0f}" for number in counts)])
        fit, limit = result["line"], f"exponent < {result['naive_exponent']:.2f}"
        wanted = f"R^2 >= {WANTED_R2:g}, exponent <= {LARGEST_EXPONENT:g}" if result["linear"] else limit
        numbers = [f"{fit['intercept']:.2f} {fit['slope']:+.4f} x", f"{fit['r2']:.4f}"]
        numbers += [f"{result[key]:.2f}" for key in ("exponent", "naive_exponent", "growth", "naive_growth")]
        fits.append([result["label"], *numbers, wanted, yes(result["reached"])])
    header = ["varied", "size", "s/step (min-max)", "tokens of separate sequences", "with shared prompts"]
    growth = ["growth of step time with", "line", "R^2", "exponent", "of separate sequences", "times", "of separate sequences"]
    return f"{table(header, points)}\n\n{table([*growth, 'wanted', 'reached'], fits)}"


main = entry(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
