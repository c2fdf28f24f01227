"""Means, differences and rank correlations with their 95% intervals."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import covariance, fmean, quantiles, stdev, variance

from scipy.stats import spearmanr, t, ttest_1samp

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
    """Mean with Student's interval; no interval for a single value."""
    value = fmean(values)
    if len(values) < 2:
        return Estimate(value, math.nan, math.nan, len(values))
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return Estimate(value, value - half, value + half, len(values))


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Mean difference over the seeds that both have; None without common seeds."""
    common = sorted(ours.keys() & theirs.keys())
    return mean([ours[seed] - theirs[seed] for seed in common]) if common else None


def p_value(values: Sequence[float]) -> float:
    """p-value of Student's two-sided test that the mean of these differences is 0; 1 if there are too few."""
    if len(values) < 2 or len(set(values)) == 1:
        return 0.0 if len(values) > 1 and values[0] else 1.0
    return float(ttest_1samp(values, 0.0).pvalue)


def holm(p_values: Sequence[float], level: float = 1 - CONFIDENCE) -> list[bool]:
    """Which of several hypotheses are rejected, so that the chance of a single wrong one is at most `level` (Holm, 1979)."""
    rejected = [False] * len(p_values)
    for passed, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        if p_values[place] > level / (len(p_values) - passed):
            break
        rejected[place] = True
    return rejected


def gap_closed(ours: Mapping[int, float], low: Mapping[int, float], high: Mapping[int, float]) -> Estimate | None:
    """Share of the gap between two methods that a third one closes, on the seeds that all have."""
    seeds = sorted(ours.keys() & low.keys() & high.keys())
    if not seeds:
        return None
    return ratio([ours[s] - low[s] for s in seeds], [high[s] - low[s] for s in seeds])


def ratio(parts: Sequence[float], wholes: Sequence[float]) -> Estimate:
    """Ratio of two means over the same seeds, with Fieller's interval: all q for which the mean of `part - q whole` may be 0.

    Percentiles of a bootstrap would be too narrow for only eight seeds. The interval is unbounded if the wholes' mean may be 0.
    """
    count, part, whole = len(parts), fmean(parts), fmean(wholes)
    value = part / whole if whole else math.nan
    if count < 2:
        return Estimate(value, math.nan, math.nan, count)
    factor = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) ** 2 / count
    # a q^2 - 2 b q + c <= 0
    a = whole**2 - factor * variance(wholes)
    b = part * whole - factor * covariance(parts, wholes)
    c = part**2 - factor * variance(parts)
    if a <= 0:
        return Estimate(value, -math.inf, math.inf, count)
    half = math.sqrt(max(0.0, b**2 - a * c))
    return Estimate(value, (b - half) / a, (b + half) / a, count)


def correlation(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Spearman's rank correlation, with the percentiles of a bootstrap over the pairs as its interval."""
    places = range(len(first))

    def of(chosen: Sequence[int]) -> float:
        ours, theirs = [first[i] for i in chosen], [second[i] for i in chosen]
        has_order = len(set(ours)) > 1 and len(set(theirs)) > 1  # or else scipy warns every time
        return float(spearmanr(ours, theirs).statistic) if has_order else math.nan

    rng = random.Random(0)
    drawn = [number for _ in range(RESAMPLES) if math.isfinite(number := of(rng.choices(places, k=len(places))))]
    cuts = quantiles(drawn, n=40) if len(drawn) > 1 else [math.nan]  # none where all are equal
    return Estimate(of(places), cuts[0], cuts[-1], len(places))
