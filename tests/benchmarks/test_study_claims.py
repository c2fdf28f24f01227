from dataclasses import replace

import pytest
from study_records import keep, record

from benchmarks.study.claims import LORA, line_at, points_of
from benchmarks.study.figures import beside_others
from benchmarks.study.store import Store


def _points(tmp_path, **accuracies):
    for name, (trained, values) in accuracies.items():
        for seed, value in enumerate(values):
            keep(tmp_path, record(name, seed=seed, purpose="frontier", accuracy=value, trainable=trained))
    return points_of(Store(tmp_path), "sums")


def test_a_distance_is_to_the_line_at_the_same_size(tmp_path):
    points = _points(tmp_path, lora_r1=(100, (0.2, 0.3)), lora_r4=(400, (0.4, 0.7)), fft=(6400, (0.8, 0.9)))
    assert line_at(points, LORA, 100) == pytest.approx({0: 0.2, 1: 0.3})
    assert line_at(points, LORA, 200) == pytest.approx({0: 0.3, 1: 0.5})  # half of the way by the logarithm
    assert line_at(points, LORA, 1600) == pytest.approx({0: 0.6, 1: 0.8})
    assert line_at(points, LORA, 99) == line_at(points, LORA, 6401) == {}


def test_methods_that_began_at_different_policies_are_not_compared(tmp_path):
    keep(tmp_path, record("lora_r4", seed=3, purpose="frontier"))
    job, other = record("fft", seed=3, purpose="frontier")
    keep(tmp_path, (job, replace(other, model_digest="abc")))
    with pytest.raises(SystemExit, match=r"seed 3 of sums .* policy abc, and from or for 0: .* another machine"):
        points_of(Store(tmp_path), "sums")


def test_what_a_start_policy_adds_to_all_methods_is_not_in_the_intervals_of_the_figure(tmp_path):
    points = _points(tmp_path / "all", lora_r4=(400, (0.2, 0.5, 0.8)), own_r4=(400, (0.3, 0.61, 0.89)))
    found = beside_others(points)
    assert found["lora_r4"].value == pytest.approx(0.5) and found["own_r4"].value == pytest.approx(0.6)
    assert all(0 < estimate.high - estimate.low < 0.05 for estimate in found.values())
    # A method with easy seeds alone stands where it would with all.
    points = _points(tmp_path, lora_r4=(400, (0.8, 0.5, 0.2)), mlp_r4=(400, (0.8, 0.5, 0.2)), own_r4=(400, (0.9, 0.62)))
    assert beside_others(points)["own_r4"].value == pytest.approx(0.61)
