"""How well a policy solves problems: avg@n, pass@k and maj@k with confidence intervals, for each named set of problems."""

from hybrid_lightning.metrics.completions import completion_draws, completion_values, maj_at_k, numbers_of_voters, pass_at_k
from hybrid_lightning.metrics.problem_means import (
    LOWER,
    OVERALL,
    UPPER,
    Difference,
    Problem,
    ProblemMeans,
    check_set_name,
    confidence_interval,
    difference,
)

__all__ = [
    "LOWER",
    "OVERALL",
    "UPPER",
    "Difference",
    "Problem",
    "ProblemMeans",
    "check_set_name",
    "completion_draws",
    "completion_values",
    "confidence_interval",
    "difference",
    "maj_at_k",
    "numbers_of_voters",
    "pass_at_k",
]
