"""Means over problems, each counted once, for each set and over sets."""

import pytest
import torch

from hybrid_lightning.errors import DataError
from hybrid_lightning.metrics import ProblemMeans, confidence_interval

SETS = ["hard", "easy", "easy", "hard", "easy"]
INDEX = torch.tensor([3, 3, 8, 5, 9])
SHARE = torch.tensor([0.0, 1.0, 0.5, 0.25, 1.0])
LENGTH = torch.tensor([40.0, 10.0, 20.0, 60.0, 30.0])


def means(*updates, sets=SETS):
    metric = ProblemMeans({"share": 4, "length": None})
    for rows in updates:
        metric.update([sets[row] for row in rows], INDEX[rows], {"share": SHARE[rows], "length": LENGTH[rows]})
    return {name: {key: float(value) for key, value in part.items()} for name, part in metric.compute().items()}


def test_each_set_has_its_mean_and_all_sets_the_same_weight():
    found = means([0, 1, 2], [3, 4])
    assert list(found) == ["", "easy", "hard"]
    easy, hard = SHARE[[1, 2, 4]], SHARE[[0, 3]]
    for name, parts, problems in (("easy", [easy], 3), ("hard", [hard], 2), ("", [easy, hard], 5)):
        low, high = confidence_interval([part.double() for part in parts], 4)
        expected = {
            "problems": problems,
            "share": sum(float(part.mean()) for part in parts) / len(parts),
            "share/ci_low": low,
            "share/ci_high": high,
            "length": {"easy": 20.0, "hard": 50.0, "": 35.0}[name],
        }
        assert found[name] == pytest.approx(expected)


def test_what_is_repeated_counts_once_within_its_set_and_batches_do_not_matter():
    assert means([0, 1, 2, 3, 4]) == means([0], [1, 0, 2], [3], [4, 4, 2])
    assert means([0, 1])[""]["problems"] == 2, "index 3 of one set is not index 3 of the other"


def test_problems_without_a_set_are_one_set():
    found = means([1, 2, 3, 4], sets=[""] * 5)
    assert list(found) == [""] and found[""]["problems"] == 4
    assert found[""]["share"] == pytest.approx(float(SHARE[1:].mean()))
    assert list(means([0, 1], sets=["a", ""])) == ["", "unnamed", "a"], "beside sets with a name they get one"


def test_nothing_seen_gives_nothing_also_after_a_reset():
    metric = ProblemMeans({"share": 1})
    metric.update(["ä"], INDEX[:1], {"share": SHARE[:1]})
    assert "ä" in metric.compute() and metric.state_dict() == {}
    metric.reset()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert metric.compute() == {}


def test_a_name_has_an_end():
    with pytest.raises(DataError, match="at most 64 bytes"):
        ProblemMeans({"share": 1}).update(["n" * 65], INDEX[:1], {"share": SHARE[:1]})
