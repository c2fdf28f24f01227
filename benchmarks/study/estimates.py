"""Means, differences and rank correlations with their 95% intervals."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles, stdev

from scipy.stats import spearmanr, t

CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A number and the interval that holds it with 95% confidence."""

    value: float
    low: float
    high: float
    number: int  # of values that it is made of

    def text(self, scale: float = 100.0, digits: int = 1) -> str:
        """Value and interval, by default in percent."""
        value, low, high = (scale * number for number in (self.value, self.low, self.high))
        if math.isnan(value):
            return "-"
        if math.isnan(low):
            return f"{value:.{digits}f}"
        return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def mean(values: Sequence[float]) -> Estimate:
    """Mean with Student's interval; without one where there is a single value."""
    value = fmean(values)
    if len(values) < 2:
        return Estimate(value, math.nan, math.nan, len(values))
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return Estimate(value, value - half, value + half, len(values))


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Mean difference over the seeds that both have; None where there is none."""
    common = sorted(ours.keys() & theirs.keys())
    return mean([ours[seed] - theirs[seed] for seed in common]) if common else None


def resampled(seeds: Sequence[int], statistic: Callable[[Sequence[int]], float]) -> Estimate:
    """A statistic of seeds, with the interval of its values on seeds drawn with replacement (percentiles of a bootstrap)."""
    value = statistic(seeds)
    if len(seeds) < 2:
        return Estimate(value, math.nan, math.nan, len(seeds))
    rng = random.Random(0)
    drawn = [number for _ in range(RESAMPLES) if math.isfinite(number := statistic(rng.choices(seeds, k=len(seeds))))]
    if len(drawn) < 2:  # such as the share of no gap
        return Estimate(value, math.nan, math.nan, len(seeds))
    cuts = quantiles(drawn, n=40)
    return Estimate(value, cuts[0], cuts[-1], len(seeds))


def gap_closed(ours: Mapping[int, float], low: Mapping[int, float], high: Mapping[int, float]) -> Estimate | None:
    """Share of the gap between two methods that a third one closes, on the seeds that all have."""
    seeds = sorted(ours.keys() & low.keys() & high.keys())
    if not seeds:
        return None

    def share(chosen: Sequence[int]) -> float:
        gap = fmean(high[s] for s in chosen) - fmean(low[s] for s in chosen)
        return (fmean(ours[s] for s in chosen) - fmean(low[s] for s in chosen)) / gap if gap else math.nan

    return resampled(seeds, share)


def correlation(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Spearman's rank correlation, with the interval of a bootstrap over the pairs."""
    places = range(len(first))

    def spearman(chosen: Sequence[int]) -> float:
        return float(spearmanr([first[i] for i in chosen], [second[i] for i in chosen]).statistic)

    return resampled(places, spearman)
