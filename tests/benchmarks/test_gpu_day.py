"""The measurements for a GPU run to their end on a CPU, with tiny sizes, and a part that fails does not end the others."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.commands import environment

pytest.importorskip("bitsandbytes", reason="one part takes a step on a base in 4 bits")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there it is to be run as it is")

BROKEN = """
from benchmarks import gpu_day
def graphs(day):
    raise RuntimeError("no kernel image is available")
gpu_day.PARTS["graphs"] = graphs
print("late:", gpu_day.run(gpu_day.Day(gpu_day.Path("."), tiny=True), ["agreement"], minutes=0.0))
gpu_day.main()
"""


def run(tmp_path, *command):
    """In a process of its own, since it prepares its process and seeds it."""
    done = subprocess.run(
        [sys.executable, *command, "--out", str(tmp_path)], capture_output=True, text=True, env=environment(1), check=False
    )
    return done, json.loads((tmp_path / "gpu_day.json").read_text())["results"], (tmp_path / "gpu_day.md").read_text()


def test_all_parts_run_to_their_end(tmp_path):
    done, results, page = run(tmp_path, "-m", "benchmarks.gpu_day")
    assert done.returncode == 0, done.stderr[-2000:]
    parts = ["agreement", "graphs", "speed", "determinism", "resume", "precisions", "quantization", "vllm", "trl", "kernels"]
    assert list(results) == parts and "FAILED" not in page
    assert results["agreement"]["mean"] < 0.01 and results["determinism"]["equal bits"] and results["resume"]["equal bits"]
    assert results["precisions"]["bf16-mixed"] and results["quantization"]["finite weights"]
    assert len(results["speed"]["seconds of steps"]) == 4 and results["speed"]["planned GiB"] > 0
    assert "a CPU" in results["graphs"]["not on this device"]
    assert "whose numbers say nothing" in page and all(f"## {name}" in page for name in parts)


def test_a_part_that_fails_is_written_down_and_the_others_go_on(tmp_path):
    """And no part begins when the time is over."""
    parts = ("--parts", "graphs", "quantization")
    done, results, _ = run(tmp_path, "-c", BROKEN, *parts)
    assert done.returncode == 1 and "error: some parts failed" in done.stderr
    assert results["graphs"]["FAILED"] == "RuntimeError: no kernel image is available"
    assert results["quantization"]["finite weights"]
    assert "late: {'agreement': {'left out': 'the 0 minutes were over'}}" in done.stdout
