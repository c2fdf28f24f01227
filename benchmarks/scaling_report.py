"""How the time of a step grows: lines, exponents, and what separate sequences would have to compute."""

import math
from dataclasses import asdict, dataclass
from statistics import correlation, linear_regression, median
from typing import Any

from commands import columns
from report import yes
from workloads import Workload

# For a growth to be called linear. A large R^2 alone would not do: over a few sizes a line explains much of x^1.5 as well.
WANTED_R2 = 0.98
LARGEST_EXPONENT = 1.1


@dataclass(frozen=True)
class Series:
    """Workloads that differ in one size alone."""

    name: str
    label: str  # of the x axis
    points: tuple[tuple[int, Workload], ...]  # x, and what is measured there
    linear: bool  # whether a straight line is wanted, or else less growth than separate sequences would have


def naive_tokens(workload: Workload) -> int:
    """Tokens in a rollout's forward and backward pass if every completion is a sequence of its own: P G (prompt + T)."""
    assert workload.prompt_tokens is not None
    return workload.rows * (workload.prompt_tokens + workload.max_new_tokens)


def shared_tokens(workload: Workload) -> int:
    """The same if a prompt is computed once for its completions: P (prompt + G T)."""
    assert workload.prompt_tokens is not None
    return workload.prompts * (workload.prompt_tokens + workload.samples * workload.max_new_tokens)


def line(x: list[float], y: list[float]) -> dict[str, float]:
    """Least squares: y = intercept + slope x, and R^2, the share of y's variance that the line explains."""
    slope, intercept = linear_regression(x, y)
    return {"slope": slope, "intercept": intercept, "r2": correlation(x, y) ** 2}


def exponent(x: list[float], y: list[float]) -> float:
    """The b of y = a x^b, by least squares of the logarithms."""
    return linear_regression([math.log(value) for value in x], [math.log(value) for value in y]).slope


def summarize(series: Series, steps: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """The points of a series, what fits them, and whether it is what is wanted; the warm-ups do not count.

    Args:
        series: What was measured.
        steps: All steps at each point, the discarded one first.
    """
    x = [float(size) for size, _ in series.points]
    seconds = [median(step["seconds"] for step in done[1:]) for done in steps]
    naive = [float(naive_tokens(workload)) for _, workload in series.points]
    shared = [float(shared_tokens(workload)) for _, workload in series.points]
    fit = line(x, seconds)
    result: dict[str, Any] = {
        "label": series.label,
        "linear": series.linear,
        "x": x,
        "seconds_median": seconds,
        "settings": [asdict(workload) for _, workload in series.points],
        "steps": steps,
        "line": fit,
        "exponent": exponent(x, seconds),
        "growth": seconds[-1] / seconds[0],  # from the first to the last point
        "naive_tokens": naive,
        "naive_exponent": exponent(x, naive),
        "naive_growth": naive[-1] / naive[0],
        "shared_tokens": shared,
    }
    result["reached"] = reached(result)
    return result


def reached(result: dict[str, Any]) -> bool:
    """Whether time grows along a line, or else as a power below that of separate sequences, which is itself below 1."""
    if result["linear"]:
        return bool(result["line"]["r2"] >= WANTED_R2 and 0 < result["exponent"] <= LARGEST_EXPONENT)
    return bool(result["exponent"] < result["naive_exponent"])


def wanted(result: dict[str, Any]) -> str:
    """The same in words."""
    if result["linear"]:
        return f"R^2 >= {WANTED_R2:g}, exponent <= {LARGEST_EXPONENT:g}"
    return f"exponent < {result['naive_exponent']:.2f}"


def tables(results: dict[str, dict[str, Any]]) -> str:
    """Seconds at every point, and the fits, as text."""
    points = [["varied", "size", "s/step (min-max)", "tokens of separate sequences", "tokens with shared prompts"]]
    fits = [["growth of step time with", "line", "R^2", "exponent", "separate sequences'", "wanted", "reached"]]
    for name, result in results.items():
        rows = zip(result["x"], result["steps"], result["naive_tokens"], result["shared_tokens"], strict=True)
        for x, steps, naive, shared in rows:
            seconds = [step["seconds"] for step in steps[1:]]
            spent = f"{median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f})"
            points.append([name, f"{x:.0f}", spent, f"{naive:.0f}", f"{shared:.0f}"])
        fit = result["line"]
        fits.append(
            [
                result["label"],
                f"{fit['intercept']:.2f} {fit['slope']:+.4f} x",
                f"{fit['r2']:.4f}",
                f"{result['exponent']:.2f}",
                f"{result['naive_exponent']:.2f}",
                wanted(result),
                yes(result["reached"]),
            ]
        )
    prompt = results["prompt"]
    compared = (
        f"From the smallest to the largest prompt x G, step time grew {prompt['growth']:.2f} times; the tokens of separate "
        f"sequences, {prompt['naive_growth']:.2f} times."
    )
    return "\n".join([columns(points), "", columns(fits), "", compared])
