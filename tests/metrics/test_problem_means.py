"""Means over problems, each counted once, for each set and over sets, and their intervals.

These are Wilson's own for one completion a problem, and cover the truth as often as they say.
"""

from math import inf, sqrt

import pytest
import torch

from hybrid_lightning.errors import DataError
from hybrid_lightning.metrics import ProblemMeans, confidence_interval, difference

SETS = ["hard", "easy", "easy", "hard", "easy"]
INDEX = torch.tensor([3, 3, 8, 5, 9])
SHARE = torch.tensor([0.0, 1.0, 0.5, 0.25, 1.0])
LENGTH = torch.tensor([40.0, 10.0, 20.0, 60.0, 30.0])


def means(*updates, sets=SETS):
    metric = ProblemMeans({"share": 4, "length": None})
    for rows in updates:
        metric.update([sets[row] for row in rows], INDEX[rows], {"share": SHARE[rows], "length": LENGTH[rows]})
    return values_of(metric)


def values_of(metric):
    return {name: {key: float(value) for key, value in part.items()} for name, part in metric.compute().items()}


def test_each_set_has_its_mean_and_all_sets_the_same_weight():
    found = means([0, 1, 2], [3, 4])
    assert list(found) == ["", "easy", "hard"]
    easy, hard = SHARE[[1, 2, 4]], SHARE[[0, 3]]
    for name, parts, problems, length in (("easy", [easy], 3, 20.0), ("hard", [hard], 2, 50.0), ("", [easy, hard], 5, 35.0)):
        low, high = confidence_interval([part.double() for part in parts], 4)
        share = sum(float(part.mean()) for part in parts) / len(parts)
        expected = {"problems": problems, "share": share, "share/ci_low": low, "share/ci_high": high, "length": length}
        assert found[name] == pytest.approx(expected)


def test_what_is_repeated_counts_once_within_its_set_and_what_has_none_is_one():
    """`sharding/test_equal_to_one_process.py` tests it on ranks, where no rank sees all problems."""
    assert means([0, 1, 2, 3, 4]) == means([0], [1, 0, 2], [3], [4, 4, 2])
    assert means([0, 1])[""]["problems"] == 2, "index 3 of one set is not index 3 of the other"
    found = means([1, 2, 3, 4], sets=[""] * 5)
    assert list(found) == [""] and found[""]["problems"] == 4
    assert found[""]["share"] == pytest.approx(float(SHARE[1:].mean()))
    assert list(means([0, 1], sets=["a", ""])) == ["", "unnamed", "a"], "beside sets with a name they get one"
    metric = ProblemMeans({"share": 4})
    metric.update(["b", "a", "b"], torch.tensor([3, 1, 3]), {"share": torch.tensor([0.5, 1.0, 0.5])})
    metric.compute()
    assert metric.by_problem == {("b", 3): {"share": 0.5}, ("a", 1): {"share": 1.0}}


def test_problems_without_a_value_are_in_no_mean():
    metric = ProblemMeans({"share": 4, "length": None})
    share, length = SHARE.clone(), LENGTH.clone()
    share[[1, 3]], length[3] = torch.nan, torch.nan
    metric.update(SETS, INDEX, {"share": share, "length": length})
    found = values_of(metric)
    assert (found["easy"]["share"], found["easy"]["length"], found["easy"]["problems"]) == (0.75, 20.0, 3)
    assert (found["hard"]["share"], found["hard"]["length"], found["hard"]["problems"]) == (0.0, 40.0, 1)
    low, high = confidence_interval([share[[2, 4]].double()], 4)
    assert (found["easy"]["share/ci_low"], found["easy"]["share/ci_high"]) == pytest.approx((low, high))
    assert (found[""]["share"], found[""]["length"], found[""]["problems"]) == (0.375, 30.0, 4)


def test_nothing_seen_gives_nothing_also_after_a_reset_and_a_name_has_an_end():
    metric = ProblemMeans({"share": 1})
    metric.update(["ä"], INDEX[:1], {"share": SHARE[:1]})
    assert "ä" in metric.compute() and metric.state_dict() == {}
    metric.reset()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert metric.compute() == {}
    with pytest.raises(DataError, match="at most 64 bytes"):
        metric.update(["n" * 65], INDEX[:1], {"share": SHARE[:1]})


# ---- intervals

Z = 1.959963984540054


def wilson(successes, trials):
    share = successes / trials
    centre = (share + Z**2 / (2 * trials)) / (1 + Z**2 / trials)
    width = Z / (1 + Z**2 / trials) * sqrt(share * (1 - share) / trials + Z**2 / (4 * trials**2))
    return max(0.0, centre - width), min(1.0, centre + width)


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (3, 10), (70, 400)])
def test_with_one_completion_a_problem_it_is_wilsons(successes, trials):
    values = torch.tensor([1.0] * successes + [0.0] * (trials - successes), dtype=torch.float64)
    assert confidence_interval([values], 1) == pytest.approx(wilson(successes, trials), abs=1e-12)


def test_completions_of_a_problem_are_no_problems_and_a_mean_of_all_or_none_is_an_end():
    """Eight completions that all agree are worth one; eight that are drawn alike everywhere at most eight."""
    agreeing = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    assert confidence_interval([agreeing], 8) == confidence_interval([agreeing], 1)
    assert confidence_interval([torch.full((4,), 0.5, dtype=torch.float64)], 8) == pytest.approx(wilson(16, 32))
    assert confidence_interval([torch.ones(4)], 8) == pytest.approx(wilson(4, 4)), "all solved may be luck"
    for problems, solved in ((1, 0), (30, 0), (1, 1), (30, 1)):
        ends = confidence_interval([torch.full((problems,), float(solved), dtype=torch.float64)], 8)
        assert ends[solved] == solved and 0 < ends[1] - ends[0] < 1


def test_of_several_sets_the_small_one_decides():
    small, large = torch.tensor([1.0, 0.0] * 5), torch.tensor([1.0, 0.0] * 500)
    low, high = confidence_interval([small, large], 1)
    alone = confidence_interval([small], 1)
    assert (low + high) / 2 == pytest.approx(0.5)
    assert high - low == pytest.approx((alone[1] - alone[0]) / 2, rel=0.15), "half of the mean is as sure as the small set"
    assert confidence_interval([small, small], 1) == pytest.approx(wilson(10, 20)), "two alike are one of both"


# Chances of problems that are solved or not, alike, and hard; each with few and many problems and completions.
@pytest.mark.parametrize(
    ("problems", "completions", "a", "b"), [(10, 1, 0.3, 0.3), (100, 8, 0.3, 0.3), (10, 8, 5.0, 5.0), (30, 1, 1.0, 9.0)]
)
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


def by_index(values):
    return {("", index): float(value) for index, value in enumerate(values)}


def test_a_difference_of_pairs_has_newcombes_interval_which_stays_within_what_is_possible():
    """By hand, with Wilson's intervals of both sides: of five problems the second and fifth are solved anew."""
    before, after = by_index([0, 0, 1, 1, 0]), by_index([1, 0, 1, 1, 1])
    (low_0, high_0), (low_1, high_1) = wilson(2, 5), wilson(4, 5)
    phi = (2 * 1 - 2 * 0 - 5 / 2) / sqrt(2 * 3 * 4 * 1)  # both, neither, one alone; with the correction it is not positive
    assert phi < 0
    low, high = 0.4 - sqrt((0.8 - low_1) ** 2 + (high_0 - 0.4) ** 2), 0.4 + sqrt((high_1 - 0.8) ** 2 + (0.4 - low_0) ** 2)
    assert difference(before, after, True, 1) == pytest.approx((0.4, low, high, 5))
    assert difference(before, after, False, 1) == pytest.approx((0.4, low, high, 5))
    for solved in (6, 8):  # of eight, none before
        found = difference(by_index([0] * 8), by_index([1] * solved + [0] * (8 - solved)), True, 1)
        assert 0 < found.low < found.value <= found.high <= 1 and found.direction == 1
    # A problem that one of the two does not have takes no part, and a reward has an interval from five problems on.
    assert difference(before | {("", 5): 0.0, ("", 6): float("nan")}, after | {("", 6): 1}, True, 1).problems == 5
    assert [difference(by_index([0.1] * n), by_index([7, 0.3, 2, 0.3, 4][:n]), True, inf).direction for n in (4, 5)] == [0, 1]


def test_the_sets_of_a_difference_have_the_same_weight():
    before = {**{("easy", index): 0.0 for index in range(8)}, **{("hard", index): 0.0 for index in range(2)}}
    after = before | {("hard", 0): 1.0, ("hard", 1): 0.5}
    assert difference(before, after, True, 2)[::3] == (0.375, 10), "the mean of 0 and 0.75"


@pytest.mark.parametrize(("problems", "draws"), [(8, 1), (20, 4), (40, 1), (40, inf)])
def test_a_difference_covers_the_truth_as_often_as_it_says(problems, draws):
    """Problems with uniform chances, a fifth of what is missing learned; of rewards from -1 to 3, with noise: 300 times."""
    generator, covered = torch.Generator().manual_seed(problems), 0
    for _ in range(300):
        chances = torch.rand(problems, generator=generator)
        if draws == inf:
            sides = [4 * chances - 1 + torch.randn(problems, generator=generator) + shift for shift in (0.0, 0.5)]
        else:
            pair = (chances, chances + (1 - chances) / 5)
            sides = [torch.binomial(torch.full_like(chances, draws), chance, generator=generator) / draws for chance in pair]
        found = difference(*(by_index(side) for side in sides), True, draws)
        covered += found.low <= (0.5 if draws == inf else 0.1) <= found.high
    assert 0.9 <= covered / 300 <= 0.995, covered / 300
