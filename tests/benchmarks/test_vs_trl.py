"""The comparison with TRL: its numbers, and one small run from beginning to end."""

import json
from dataclasses import replace
from importlib.util import find_spec

import pytest

from benchmarks.speed import vs_trl
from benchmarks.workloads import WORKLOADS

GIB = 2**30


def steps(seconds, peaks):
    return [
        {"seconds": s, "processor_seconds": s, "tokens": 10, "rows": 2, "memory": {"cpu_peak": peak * GIB}}
        for s, peak in zip(seconds, peaks, strict=True)
    ]


def summarize(**sides):
    facts = {side: {"memory": {"cpu": GIB}} for side in sides}
    return vs_trl.summarize(WORKLOADS["main"], {"facts": facts, "steps": sides}, "cpu")


def test_ratios_are_taken_pair_by_pair_without_the_warm_up_and_one_side_alone_has_none(tmp_path):
    ours = steps([50.0, 2.0, 5.0, 5.0], [2, 2, 3, 3])
    result = summarize(trl=steps([90.0, 10.0, 30.0, 20.0], [10, 9, 8, 8]), ours=ours)
    assert result["ratio"] == {"median": 5.0, "min": 4.0, "max": 6.0} and result["memory_ratio"] == pytest.approx(0.3)
    assert result["reached"] == {"speed": True, "memory": True}
    assert result["summary"]["trl"]["above_loaded_model"] == 9 * GIB
    cells = ["main", "20.00", "5.00", "5.00 (4.00-6.00)", "4", "yes", "10.00", "3.00", "0.30", "0.33", "yes", "5.0", "5.0"]
    assert vs_trl.row("main", result) == cells and len(vs_trl.HEADER) == len(cells)
    result = summarize(ours=steps([9.0, 3.0], [2, 2]))
    assert vs_trl.row("main", result) == ["main", "-", "3.00", "-", "-", "-", "-", "2.00", "-", "-", "-", "-", "5.0"]
    vs_trl.draw({"main": result}, "one side", tmp_path / "one.png")


@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed: pip install 'trl>=1.16,<2'")
@pytest.mark.usefixtures("forked")
def test_the_tiny_workload_from_beginning_to_end(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(WORKLOADS, "tiny", replace(WORKLOADS["tiny"], prompts=4))
    code = vs_trl.main(["--workload", "tiny", "--pairs", "1", "--threads", "1", "--out", str(tmp_path)])
    out, err = capsys.readouterr()
    assert code == 0, err
    written = json.loads((tmp_path / "vs_trl.json").read_text())
    result = written["workloads"]["tiny"]
    for side in ("trl", "ours"):
        warm_up, step = result["steps"][side]
        assert (warm_up["optimizer_steps"], step["optimizer_steps"]) == (2, 4)
        assert step["rows"] == 32 and 32 <= step["tokens"] <= 32 * 20
        assert step["memory"]["cpu_peak"] >= step["memory"]["cpu"] > 0
    ratio = result["steps"]["trl"][1]["seconds"] / result["steps"]["ours"][1]["seconds"]
    assert result["ratio"]["median"] == pytest.approx(ratio) and f"| {ratio:.2f} (" in out
    trl, ours = ({**facts, "memory": 0, "settings": 0} for facts in result["facts"].values())
    assert trl == {**ours, "threads": 1}
    assert (tmp_path / "vs_trl.png").read_bytes().startswith(b"\x89PNG")
