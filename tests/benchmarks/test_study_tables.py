"""What the study makes of the runs of a task: comparisons and tables."""

from dataclasses import replace

import pytest

pytest.importorskip("scipy", reason="the study's intervals need scipy: pip install 'hybrid-lightning[study]'")

from study_records import keep, record, results_with_a_gap

from benchmarks.study import tables
from benchmarks.study.comparison import UNSEEN, compare, group_of, over_tasks
from benchmarks.study.records import TUNING_SEEDS
from benchmarks.study.store import Store


def test_a_comparison_by_hand(tmp_path):
    results_with_a_gap(tmp_path)
    comparison = compare(Store(tmp_path), "sums")
    assert comparison.has_gap
    hybrid, lora, fft = (comparison.rows[name] for name in ("hybrid", "lora", "fft"))
    over_lora = comparison.over("hybrid", "lora").value
    assert hybrid.accuracy.value == pytest.approx(0.787) and over_lora == pytest.approx(0.787 - lora.accuracy.value)
    assert comparison.gap_closed("hybrid").value == pytest.approx(over_lora / (fft.accuracy.value - lora.accuracy.value))
    assert comparison.over("lora", "lora") is comparison.over("lora", "nothing") is None
    assert comparison.best_baseline is comparison.rows["dora"]
    assert comparison.relative_gain() == pytest.approx(0.787 / 0.517 - 1)
    text = tables.targets([comparison])
    assert "closes 90% of the gap on sums | 93 [" in text and "+52.2%" in text and "**no**" not in text


def test_seeds_that_the_best_baseline_lacks_change_no_gain_over_it(tmp_path):
    results_with_a_gap(tmp_path)
    gain = compare(Store(tmp_path), "sums").relative_gain()
    keep(tmp_path, *(record("hybrid", seed=s, accuracy=0.99) for s in range(20, 28)))
    assert compare(Store(tmp_path), "sums").rows["hybrid"].accuracy.number > 8
    assert compare(Store(tmp_path), "sums").relative_gain() == pytest.approx(gain)


def test_what_is_not_reached_is_said(tmp_path):
    results_with_a_gap(tmp_path)
    comparison = compare(Store(tmp_path), "sums")
    weak = {**comparison.rows, "hybrid": comparison.rows["random"]}
    assert tables.targets([replace(comparison, rows=weak)]).count("**no**") == 3  # the gap, and twice the random choice itself


def test_the_ratio_of_a_task_is_that_of_the_better_tuning(tmp_path):
    results_with_a_gap(tmp_path)
    keep(tmp_path, *(record("hybrid_one_rate", seed=s, accuracy=0.7) for s in range(8)))  # which the test problems like less
    for name, validation in (("hybrid", 0.5), ("hybrid_one_rate", 0.6)):
        keep(tmp_path, *(record(name, seed=s, purpose="sweep", validation=validation) for s in TUNING_SEEDS))
    rows = compare(Store(tmp_path), "sums").rows
    assert rows["hybrid_tuned_ratio"].accuracy.value == pytest.approx(0.7) and group_of("hybrid_tuned_ratio") == "hybrid"
    assert "random_tuned_ratio" not in rows  # it was tuned by one ratio alone


def test_choices_are_ranked_by_what_they_gain_where_there_is_a_gap(tmp_path):
    results_with_a_gap(tmp_path)
    keep(tmp_path, *(record("late", seed=s, accuracy=0.9) for s in range(8)))
    keep(tmp_path, *(record("budget_20", seed=s, accuracy=0.95) for s in range(8)))
    lines = tables.choices([compare(Store(tmp_path), "sums")]).splitlines()[2:]
    assert [line.split(" | ")[0].strip("| ") for line in lines] == ["late", "hybrid", "random"]
    assert lines[0].startswith("| late | 39.3 [") and "| 29.3 [" in lines[0]  # LoRA has 50.7 on average
    assert lines[0].endswith("| 1.00 |")


def test_choices_say_whether_they_gain_by_what_they_train(tmp_path):
    results_with_a_gap(tmp_path)
    for place, name in enumerate(("late", "early", "largest", "probe")):
        keep(tmp_path, *(record(name, seed=s, accuracy=0.9 + 0.02 * place, trainable=200 + 100 * place) for s in range(8)))
    table, _, said = tables.choices([compare(Store(tmp_path), "sums")]).rpartition("\n\n")
    # Hybrid and random train alike, so that two of the six ranks are one.
    assert said.startswith("Rank correlation") and ": 0.99 [" in said
    assert {line.split(" | ")[0]: line.split(" | ")[-1] for line in table.splitlines()}["| late"] == "2.00 |"


def test_differences_over_tasks_are_of_seeds_that_all_have(tmp_path):
    for task, gains in (("one", {0: 0.1, 1: 0.2, 2: 0.9}), ("two", {0: 0.3, 1: 0.0})):
        for seed, gain in gains.items():
            keep(tmp_path / task, record("hybrid", seed=seed, accuracy=0.4 + gain), record("lora", seed=seed, accuracy=0.4))
    estimate = over_tasks([compare(Store(tmp_path / task), "sums") for task in ("one", "two")], "hybrid", "lora")
    assert estimate is not None and estimate.number == 2 and estimate.value == pytest.approx(0.15)
    assert over_tasks([compare(Store(tmp_path / "one"), "sums")], "hybrid", "random") is None


def test_a_method_is_judged_at_its_tuned_rate_alone(tmp_path):
    for rate, validation in ((1e-2, 0.6), (2e-2, 0.5)):
        keep(tmp_path, *(record("probe", rate, seed=s, accuracy=0.1 if rate == 2e-2 else 0.7) for s in range(8)))
        keep(tmp_path, *(record("probe", rate, s, "sweep", validation=validation) for s in TUNING_SEEDS))
    row = compare(Store(tmp_path), "sums").rows["probe"]
    assert row.rate == 1e-2 and row.accuracy.number == 8 and row.accuracy.value == pytest.approx(0.7)


def test_runs_of_unseen_seeds_can_be_compared_alone(tmp_path):
    results_with_a_gap(tmp_path)
    for place, (name, value) in enumerate({"hybrid": 0.8, "random": 0.7, "random_mlp": 0.75, "lora": 0.5}.items()):
        keep(tmp_path, *(record(name, seed=UNSEEN + s, accuracy=value + 0.01 * ((s + place) % 3)) for s in range(3)))
    comparison = compare(Store(tmp_path), "sums", UNSEEN)
    assert {name: row.accuracy.number for name, row in comparison.rows.items() if name != "start"} == dict.fromkeys(
        ("lora", "hybrid", "random", "random_mlp"), 3
    )
    lines = {line.split(" | ")[0]: line for line in tables.differences([comparison]).splitlines()[2:]}
    assert set(lines) == {
        f"| {pair}" for pair in ("hybrid less lora", "hybrid less random", "hybrid less random_mlp", "random_mlp less random")
    }
    assert "| hybrid less random_mlp | 5.0 [" in lines["| hybrid less random_mlp"]
