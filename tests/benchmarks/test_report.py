"""From steps to numbers."""

import pytest
from benchmark_modules import pairs, report, workloads

GIB = 2**30


def steps(seconds, peaks, length=4):
    return [
        {"seconds": s, "processor_seconds": s, "lengths": [length, length + 2], "memory": {"cpu": 0, "cpu_peak": peak * GIB}}
        for s, peak in zip(seconds, peaks, strict=True)
    ]


@pytest.fixture
def result():
    measured = {
        "facts": {"trl": {"memory": {"cpu": GIB}}, "ours": {"memory": {"cpu": GIB // 2}}},
        "steps": {"trl": steps([90.0, 10.0, 30.0, 20.0], [8, 9, 10, 10]), "ours": steps([50.0, 2.0, 5.0, 5.0], [2, 2, 3, 3])},
    }
    return report.summarize(workloads.WORKLOADS["main"], measured, "cpu")


def test_ratios_are_taken_pair_by_pair_without_the_warm_up(result):
    assert [pair["ratio"] for pair in result["pairs"]] == [5.0, 6.0, 4.0]
    assert result["ratio"] == {"median": 5.0, "min": 4.0, "max": 6.0}
    assert result["summary"]["trl"]["seconds_median"] == 20.0
    assert result["summary"]["ours"]["seconds_median"] == 5.0
    assert result["reached"] == {"speed": True, "memory": True}


def test_memory_is_the_peak_of_all_steps(result):
    assert result["memory_ratio"] == pytest.approx(0.3)
    assert result["summary"]["trl"]["peak_bytes_above_loaded_model"] == 9 * GIB
    assert result["summary"]["ours"]["peak_bytes_above_loaded_model"] == 2.5 * GIB


def test_the_table_shows_them(result):
    cells = report.row("main", result)
    assert cells == [
        "main",
        "20.00",
        "5.00",
        "5.00 (4.00-6.00)",
        ">= 4",
        "yes",
        "10.00",
        "3.00",
        "0.30",
        "<= 0.33",
        "yes",
        "5.0, 5.0",
    ]
    header, _, line = report.table({"main": result}).splitlines()
    assert header.index("TRL s/step") == line.index("20.00")


def test_one_side_alone_has_no_ratio():
    measured = {"facts": {"ours": {"memory": {"cpu": GIB}}}, "steps": {"ours": steps([9.0, 3.0], [2, 2])}}
    result = report.summarize(workloads.WORKLOADS["ragged"], measured, "cpu")
    assert "ratio" not in result
    assert report.row("ragged", result)[:6] == ["ragged", "-", "3.00", "-", ">= 5", "-"]


@pytest.mark.parametrize("name", ["trainable_parameters", "prompt_digest", "threads", "device"])
def test_sides_that_do_not_do_the_same_are_not_compared(name):
    facts = {"trainable_parameters": 5, "prompt_digest": 6, "threads": 1, "device": "cpu"}
    pairs.check_equal({"trl": facts, "ours": dict(facts)})
    with pytest.raises(pairs.BenchmarkError, match=f"{name} differs"):
        pairs.check_equal({"trl": facts, "ours": {**facts, name: 0}})
