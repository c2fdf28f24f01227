"""Planned beside measured memory, in one small case from beginning to end."""

import json

import pytest

from benchmarks.memory import cases, planned


@pytest.mark.usefixtures("forked")
def test_one_case_from_beginning_to_end(monkeypatch, tmp_path):
    assert len({(case.model, case.name) for case in cases.CASES}) == len(cases.CASES), "names say what differs"
    case = cases.MemoryCase("embedded", prompts=2, samples=2, prompt_tokens=6, new_tokens=4, rank=4)
    monkeypatch.setattr(planned, "CASES", [case])
    assert planned.main(["--models", "embedded", "--out", str(tmp_path)]) == 0
    (found,) = json.loads((tmp_path / "memory.json").read_text())["cases"]
    assert found["plan"][0]["trainable"] == found["tensors"][0]["trainable"]
    assert abs(planned.difference(found["bytes"])) < 0.1
    assert found["parts"]["gradients"][0] == found["parts"]["gradients"][1] > 0
