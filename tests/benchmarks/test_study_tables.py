"""What the study makes of the runs of a task: comparisons and tables."""

from dataclasses import replace

import pytest
from study_records import keep, record, results_with_a_gap

from benchmarks.study import tables
from benchmarks.study.comparison import compare
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
    # What is not reached is said.
    weak = {**comparison.rows, "hybrid": comparison.rows["random"]}
    assert tables.targets([replace(comparison, rows=weak)]).count("**no**") == 3  # the gap, and twice the random choice itself


def test_a_method_is_judged_at_its_tuned_rate_alone(tmp_path):
    for rate, validation in ((1e-2, 0.6), (2e-2, 0.5)):
        keep(tmp_path, *(record("probe", rate, seed=s, accuracy=0.1 if rate == 2e-2 else 0.7) for s in range(8)))
        keep(tmp_path, *(record("probe", rate, s, "sweep", validation=validation) for s in TUNING_SEEDS))
    row = compare(Store(tmp_path), "sums").rows["probe"]
    assert row.rate == 1e-2 and row.accuracy.number == 8 and row.accuracy.value == pytest.approx(0.7)
