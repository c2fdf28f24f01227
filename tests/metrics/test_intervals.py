"""Intervals over problems: Wilson's own for one completion a problem, and how often they cover the truth."""

from math import sqrt

import pytest
import torch

from hybrid_lightning.metrics import confidence_interval

Z = 1.959963984540054


def wilson(successes, trials):
    share = successes / trials
    centre = (share + Z**2 / (2 * trials)) / (1 + Z**2 / trials)
    width = Z / (1 + Z**2 / trials) * sqrt(share * (1 - share) / trials + Z**2 / (4 * trials**2))
    return max(0.0, centre - width), min(1.0, centre + width)


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (1, 5), (3, 10), (10, 10), (70, 400)])
def test_with_one_completion_a_problem_it_is_wilsons(successes, trials):
    values = torch.tensor([1.0] * successes + [0.0] * (trials - successes), dtype=torch.float64)
    assert confidence_interval([values], 1) == pytest.approx(wilson(successes, trials), abs=1e-12)


def test_completions_of_a_problem_are_no_problems():
    """Eight completions that all agree are worth one; eight that are drawn alike everywhere at most eight."""
    agreeing = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    assert confidence_interval([agreeing], 8) == confidence_interval([agreeing], 1)
    alike = torch.full((4,), 0.5, dtype=torch.float64)
    assert confidence_interval([alike], 8) == pytest.approx(wilson(16, 32))
    assert confidence_interval([torch.ones(4)], 8) == pytest.approx(wilson(4, 4)), "all solved may be luck"


@pytest.mark.parametrize("problems", [1, 3, 30, 1319])
def test_where_all_or_none_are_solved_the_mean_is_an_end(problems):
    for solved in (0.0, 1.0):
        ends = confidence_interval([torch.full((problems,), solved, dtype=torch.float64)], 8)
        assert ends[int(solved)] == solved and 0 < ends[1] - ends[0] < 1


def test_of_several_sets_the_small_one_decides():
    small, large = torch.tensor([1.0, 0.0] * 5), torch.tensor([1.0, 0.0] * 500)
    low, high = confidence_interval([small, large], 1)
    alone = confidence_interval([small], 1)
    assert (low + high) / 2 == pytest.approx(0.5)
    assert high - low == pytest.approx((alone[1] - alone[0]) / 2, rel=0.15), "half of the mean is as sure as the small set"
    assert confidence_interval([small, small], 1) == pytest.approx(wilson(10, 20)), "two alike are one of both"


@pytest.mark.parametrize("problems", [10, 30, 100])
@pytest.mark.parametrize("completions", [1, 8])
@pytest.mark.parametrize(("a", "b"), [(0.3, 0.3), (5.0, 5.0), (1.0, 9.0)], ids=["solved or not", "alike", "hard"])
def test_it_covers_the_truth_as_often_as_it_says(problems, completions, a, b):
    """Problems drawn anew with their chances from Beta(a, b), each with its completions: 400 times."""
    generator = torch.Generator().manual_seed(problems + completions)
    shares = [torch._standard_gamma(torch.full((400, problems), shape), generator=generator) for shape in (a, b)]
    chances = shares[0] / (shares[0] + shares[1])
    solved = torch.binomial(torch.full_like(chances, completions), chances, generator=generator) / completions
    ends = [confidence_interval([row], completions) for row in solved.double()]
    covered = sum(low <= a / (a + b) <= high for low, high in ends) / len(ends)
    assert covered >= 0.9, f"covered {covered:.3f}"
    assert problems < 30 or covered <= 0.99, "no wider than it has to be"
