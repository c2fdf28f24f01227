"""Planned beside measured memory: the summary of a case, and one small case from beginning to end."""

import json

import pytest

from benchmarks.memory import cases, planned

PARTS = {"weights": 10, "gradients": 1, "optimizer": 2, "cache": 3}


def test_the_largest_of_all_moments_and_ranks_is_compared_without_what_is_packed():
    found = {
        "plan": [
            {"moments": {"updating": {**PARTS, "total": 120, "packed": 20}, "scoring": {**PARTS, "total": 90, "packed": 0}}}
        ],
        "tensors": [{"moments": {"updating": {**PARTS, "tensors": 95, "weights": 11}, "scoring": {"tensors": 80, "weights": 99}}}]
        * 2,
        "process": [{"growth": 20}, {"growth": 25}],
    }
    found["plan"][0] |= {"growth": 30, "in tensors": False}
    summary = planned.summarize(found)
    assert summary["bytes"] == [100, 95] and summary["growth"] == [30, 25] and summary["moments"] == ["updating"] * 2
    assert summary["parts"]["weights"] == [10, 11], "scoring has the base model alone"
    text = planned.tables([{"case": {"model": "embedded"}, "name": "LoRA", **summary}])
    assert "| embedded | LoRA | 0.0 | +5.3% | 0.0 | +20.0% | updating |" in text and "bytes 5%, growth 20%" in text


@pytest.mark.usefixtures("forked")
def test_one_case_from_beginning_to_end(monkeypatch, tmp_path):
    assert len({(case.model, case.name) for case in cases.CASES}) == len(cases.CASES), "names say what differs"
    case = cases.MemoryCase("embedded", prompts=2, samples=2, prompt_tokens=6, new_tokens=4, rank=4)
    monkeypatch.setattr(planned, "CASES", [case])
    assert planned.main(["--models", "embedded", "--out", str(tmp_path)]) == 0
    (found,) = json.loads((tmp_path / "memory.json").read_text())["cases"]
    assert found["plan"][0]["trainable"] == found["tensors"][0]["trainable"]
    assert abs(planned.difference(found["bytes"])) < 0.02
    assert found["parts"]["gradients"][0] == found["parts"]["gradients"][1] > 0
