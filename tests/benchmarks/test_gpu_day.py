"""The measurements for a GPU run to their end on a CPU, with tiny sizes, and a part that fails does not end the others."""

import json

import benchmark_modules  # noqa: F401  (makes the scripts importable)
import pytest
import torch

pytest.importorskip("bitsandbytes", reason="one part takes a step on a base in 4 bits")

import gpu_day

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there it is to be run as it is")


def main(monkeypatch, tmp_path, *options):
    monkeypatch.setattr("sys.argv", ["gpu_day.py", "--out", str(tmp_path), *options])
    gpu_day.main()
    return json.loads((tmp_path / "gpu_day.json").read_text()), (tmp_path / "gpu_day.md").read_text()


def test_all_parts_run_to_their_end(monkeypatch, tmp_path):
    found, page = main(monkeypatch, tmp_path)
    assert list(found["results"]) == list(gpu_day.PARTS) and "FAILED" not in page
    results = found["results"]
    assert results["agreement"]["mean"] < 0.01 and results["determinism"]["equal bits"] and results["resume"]["equal bits"]
    assert results["precisions"]["bf16-mixed"] and results["quantization"]["finite weights"]
    assert len(results["speed"]["seconds of steps"]) == 4 and results["speed"]["planned GiB"] > 0
    assert "a CPU" in results["graphs"]["not on this device"]
    assert "whose numbers say nothing" in page and all(f"## {name}" in page for name in gpu_day.PARTS)


def test_a_part_that_fails_is_written_down_and_the_others_go_on(monkeypatch, tmp_path):
    def fails(day):
        """Fails."""
        raise RuntimeError("no kernel image is available")

    monkeypatch.setitem(gpu_day.PARTS, "graphs", fails)
    with pytest.raises(SystemExit, match="some parts failed"):
        main(monkeypatch, tmp_path, "--parts", "graphs", "quantization")
    results = json.loads((tmp_path / "gpu_day.json").read_text())["results"]
    assert results["graphs"]["FAILED"] == "RuntimeError: no kernel image is available"
    assert results["quantization"]["finite weights"]


def test_no_part_begins_when_the_time_is_over(monkeypatch, tmp_path):
    found, _ = main(monkeypatch, tmp_path, "--parts", "agreement", "speed", "--minutes", "0")
    assert all("minutes were over" in part["left out"] for part in found["results"].values())
