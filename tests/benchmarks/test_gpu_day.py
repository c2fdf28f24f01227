"""The measurements for a GPU run to their end on a CPU, with tiny sizes, and a part that fails does not end the others."""

import json
import sys

import fork_server
import pytest
import torch

from benchmarks import gpu_day
from benchmarks.commands import environment

pytest.importorskip("bitsandbytes", reason="one part takes a step on a base in 4 bits")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there it is to be run as it is")


def written(folder):
    return json.loads((folder / "gpu_day.json").read_text())["results"], (folder / "gpu_day.md").read_text()


def test_all_parts_run_to_their_end(tmp_path):
    """In a process of its own, since it seeds it."""
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--out", str(tmp_path)]
    done = fork_server.run(command, capture_output=True, text=True, env=environment(1), check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    results, page = written(tmp_path)
    assert list(results) == list(gpu_day.PARTS) and "FAILED" not in page
    assert results["agreement"]["mean"] < 0.01 and results["determinism"]["equal bits"] and results["resume"]["equal bits"]
    assert results["precisions"]["bf16-mixed"] and results["quantization"]["finite weights"]
    assert (
        results["scoring"]["fully trained"]
        and len(results["speed"]["seconds of steps"]) == 4
        and results["speed"]["planned GiB"] > 0
    )
    assert "a CPU" in results["graphs"]["not on this device"]
    assert "whose numbers say nothing" in page and all(f"## {name}" in page for name in results)


def test_a_part_that_fails_is_written_down_and_the_others_go_on(tmp_path, monkeypatch):
    """And no part begins when the time is over."""

    def graphs(day):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setitem(gpu_day.PARTS, "graphs", graphs)

    def kernels(day):
        assert "FAILED" in written(tmp_path)[0]["graphs"], "results are written after each part"
        return {"layers": day.sizes.layers}

    monkeypatch.setitem(gpu_day.PARTS, "kernels", kernels)
    monkeypatch.setattr(sys, "argv", ["gpu_day", "--parts", "graphs", "kernels", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: some parts failed"):
        gpu_day.main()
    results, _ = written(tmp_path)
    assert results["graphs"]["FAILED"] == "RuntimeError: no kernel image is available" and results["kernels"]["layers"] == 2
    late = gpu_day.run(gpu_day.Day(tmp_path, tiny=True), ["graphs"], 0.0, lambda results: None)
    assert late == {"graphs": {"left out": "the 0 minutes were over"}}
