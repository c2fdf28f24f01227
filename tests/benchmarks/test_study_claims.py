"""What is claimed of the frontier."""

from dataclasses import replace

import pytest

pytest.importorskip("scipy", reason="the study's intervals need scipy: pip install 'hybrid-lightning[study]'")

from study_records import keep, record

from benchmarks.study.claims import LORA, accuracies_table, at_one_size, claims_table, line_at, points_of, points_table
from benchmarks.study.figures import beside_others
from benchmarks.study.store import Store


def _points(tmp_path, **accuracies):
    for name, (trained, values) in accuracies.items():
        keep(
            tmp_path,
            *(record(name, seed=seed, purpose="frontier", accuracy=v, trainable=trained) for seed, v in enumerate(values)),
        )
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


def test_claims_are_marked_where_holms_correction_leaves_them(tmp_path):
    steady, doubtful = [0.5, 0.52, 0.48, 0.5], [0.5, 0.58, 0.41, 0.53]
    points = _points(
        tmp_path,
        lora_r8=(400, [value - 0.2 - 0.001 * n for n, value in enumerate(steady)]),
        own_r8=(400, steady),
        mlp_r8=(400, doubtful),
    )
    lines = claims_table({"sums": points, "others": points}, {}).splitlines()
    (above,) = [line for line in lines if line.startswith("| own_r8 less lora_r8")]
    (level,) = [line for line in lines if line.startswith("| own_r8 less mlp_r8")]
    assert above.count("**") == 6 and "20.2 [" in above and "**" not in level
    assert "**" not in claims_table({"sums": points, "others": points}, {}, looked_at=10**6), "of so many some are so by chance"


def test_a_claim_is_made_on_the_tasks_that_have_its_methods(tmp_path):
    both = _points(tmp_path, lora_r4=(400, (0.3, 0.4)), own_r4=(400, (0.5, 0.62)), mlp_r4=(400, (0.5, 0.61)))
    one = {name: point for name, point in both.items() if name != "mlp_r4"}
    lines = {line.split(" | ")[0]: line for line in claims_table({"sums": both, "others": one, "no": {}}, {}).splitlines()}
    differences, mean = lines["| own_r4 less lora_r4"].split(" | ")[1:4], lines["| own_r4 less lora_r4"].split(" | ")[4]
    assert differences[0] == differences[1] == mean.removesuffix(" |") and differences[2] == "-"
    alone = lines["| mlp_r4 less lora_r4"].split(" | ")[1:]
    assert alone[0].startswith("20.5") and alone[1:] == ["-", "-", "- |"]  # the mean of one task would be a second claim


def test_all_tasks_stand_beside_each_other_at_the_size_of_a_hybrid(tmp_path):
    points = _points(
        tmp_path,
        lora_r4=(100, (0.1, 0.2)),
        lora_r8=(200, (0.3, 0.4)),
        mlp_r4=(100, (0.2, 0.3)),
        fft=(800, (0.5, 0.6, 0.9)),
        hybrid_10_r8_one_rate=(400, (0.6, 0.7)),
    )
    assert at_one_size({"sums": points, "no": {}}).splitlines()[2:] == ["| sums | 2 | 50 | 15.0 | 45.0 | 45.0 | 65.0 | 55.0 |"]
    assert at_one_size({"sums": {name: point for name, point in points.items() if name != "mlp_r4"}}) == ""


def test_the_default_ratio_is_one_rate_unless_the_policy_is_wider(tmp_path):
    points = _points(
        tmp_path, hybrid_one_rate=(400, (0.6, 0.71)), hybrid=(400, (0.4, 0.5)), hybrid_three_quarters_rate=(400, (0.5, 0.61))
    )
    ratios = {name: {"hybrid": "hybrid"} for name in ("facts", "products_direct")}
    table = claims_table({"facts": points, "products_direct": points}, ratios)
    (line,) = [line for line in table.splitlines() if line.startswith("| default ratio less")]
    assert [cell.strip(" |*").split(" ")[0] for cell in line.split(" | ")[1:]] == ["20.5", "10.5", "15.5"]


def test_a_method_at_the_rate_of_the_one_beside_it_may_be_a_trial(tmp_path):
    points = _points(tmp_path, update_tail_10_r2_one_rate=(400, (0.5, 0.6)), random_mlp_one_rate=(400, (0.4, 0.52)))
    at_its_rate = "update_tail_10_r2_one_rate less random_mlp_one_rate at its rate"
    assert f"| {at_its_rate} | 9.0 [" in claims_table({"sums": points}, {})
    others = replace(points["random_mlp_one_rate"].records[0], job={"learning_rate": 0.02, "seed": 0})
    points["random_mlp_one_rate"] = replace(points["random_mlp_one_rate"], records=[others])
    assert at_its_rate not in claims_table({"sums": points}, {})
    for seed in (0, 1):
        keep(tmp_path, record("random_mlp_one_rate", seed=seed, purpose="trial", accuracy=0.3 + 0.11 * seed))
    trial = points_of(Store(tmp_path), "sums")["random_mlp_one_rate@0.01"]
    assert f"| {at_its_rate} | **19.5 [" in claims_table({"sums": {**points, "random_mlp_one_rate@0.01": trial}}, {})


def test_accuracies_are_of_the_methods_that_have_all_seeds(tmp_path):
    points = _points(tmp_path, lora_r4=(400, (0.4, 0.5, 0.9)), mlp_r4=(400, (0.5,)), fft=(6400, (0.8, 0.9)))
    lines = accuracies_table({"sums": points, "no": {}}).splitlines()[2:]
    assert [line.split(" [")[0] for line in lines] == ["| lora_r4 | 45.0", "| fft | 85.0"] and lines[0].endswith("] | - |")


def test_the_points_of_a_task_are_in_the_order_of_their_size(tmp_path):
    lines = points_table(
        _points(tmp_path, own_r4=(410, (0.5, 0.6)), lora_r4=(400, (0.4, 0.5)), fft=(6400, (0.8, 0.9)))
    ).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| lora_r4", "| own_r4", "| fft"]
    assert lines[3].startswith("| own_r4 | 2 | 0.01 | 410 | - | 55.0 [")


def test_what_a_start_policy_adds_to_all_methods_is_not_in_the_intervals_of_the_figure(tmp_path):
    points = _points(tmp_path, lora_r4=(400, (0.2, 0.5, 0.8)), own_r4=(400, (0.3, 0.61, 0.89)))
    found = beside_others(points)
    assert found["lora_r4"].value == pytest.approx(0.5) and found["own_r4"].value == pytest.approx(0.6)
    assert all(0 < estimate.high - estimate.low < 0.05 for estimate in found.values())


def test_a_method_with_easy_seeds_alone_stands_where_it_would_with_all(tmp_path):
    points = _points(tmp_path, lora_r4=(400, (0.8, 0.5, 0.2)), mlp_r4=(400, (0.8, 0.5, 0.2)), own_r4=(400, (0.9, 0.62)))
    assert beside_others(points)["own_r4"].value == pytest.approx(0.61)
    points = _points(tmp_path / "none", lora_r4=(400, (0.8, 0.5)), own_r4=(400, (0.9, 0.62, 0.3)))
    del points["own_r4"].records[0]  # seeds 0 and 1, 1 and 2
    assert beside_others(points)["own_r4"].value == pytest.approx(0.62)
