"""The day with a GPU, rehearsed on a CPU from beginning to end; it loses nothing where parts fail, hang, die or are stopped."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fork_server import Forked

from benchmarks import gpu_day

pytest.importorskip("bitsandbytes", reason="one part takes a step on a base in 4 bits")
pytestmark = pytest.mark.usefixtures("forked")
BAD = """import os, signal, sys, time
from benchmarks import run_gpu_part as parts
def part(day):
    yield {"first": 1.0, "CUBLAS": os.environ["CUBLAS_WORKSPACE_CONFIG"]}
    match sys.argv[1].split('"')[3]:
        case "lora": raise RuntimeError("no kernel image is available")
        case "graphs": time.sleep(600)
        case "memory": os.kill(os.getpid(), signal.SIGSEGV)
        case "scoring": os.kill(int(os.environ["DAY"]), signal.SIGTERM); time.sleep(600)
        case "float16":
            yield {"process": os.getpid()}
            time.sleep(600)
vars(parts).update(dict.fromkeys(("lora", "graphs", "memory", "resume", "scoring", "float16"), part))
parts.main()
"""
FIRST = {"card": "a CPU: numbers say nothing", "first": 1.0, "CUBLAS": ":4096:8"}


class Hurried(Forked):
    """Is out of time as soon as the part that hangs has found something."""

    def wait(self, timeout=None):
        if timeout is not None and timeout > 5 and (asked := json.loads(self.args[-1]))["part"] == "graphs":
            while not json.loads(Path(asked["out"]).read_text())["found"].get("first"):
                time.sleep(0.05)
            raise subprocess.TimeoutExpired(self.args, timeout)
        return super().wait(timeout)


def day(out, *parts, minutes=45):
    """Exit status, the results of all parts that have some, and the page."""
    code = gpu_day.main(["--device", "cpu", "--out", str(out), "--minutes", str(minutes), "--parts", *parts])
    return code, {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}, (out / "gpu_day.md").read_text()


def test_it_is_rehearsed_from_beginning_to_end(tmp_path):
    code, results, page = day(tmp_path, *gpu_day.PARTS)
    assert code == 0, page
    assert results.keys() == gpu_day.PARTS.keys() and all(f"## {name}" in page for name in results)
    assert {result["state"] for result in results.values()} <= {"done", "left out: vllm is not installed"}
    found = {name: result["found"] for name, result in results.items()}
    assert all(found[name]["finite weights"] for name in ("lora", "hybrid", "uncompiled", "float16", "nf4"))
    assert [value[:16] for name, value in found["resume"].items() if "deterministic=" in name] == ["equal bits: True"] * 2
    assert found["gspo"]["cpu, val/avg@8 after 2 steps"] > 0 and len(found["trl"]["seconds of the steps"]) == 4
    assert len(found["lora"]["seconds of the steps but the last"]) == 4 and found["scoring"]["fully trained"]
    assert found["passes"]["products of 8 rows off in torch.float32"] < 1e-6
    attention = [errors for name, errors in found["passes"].items() if name.startswith("attention off")]
    assert len(attention) == 2 and all(1e-4 < error < 0.01 for errors in attention for error in errors)
    planned, measured = found["memory"]["hybrid 10%, updating: GiB planned, measured"]
    assert 0 < measured < 2 * planned < 4 * measured
    assert [name for name in found["graphs"] if name.startswith("tokens")] == [
        *("tokens/s, 4 rows, cuda_graphs=False", "tokens of 4 rows"),
        *("tokens/s, 16 rows, cuda_graphs=False", "tokens of 16 rows"),
    ]
    assert found["graphs"]["tokens of 16 rows"].startswith("1 to 6, mean ") and len(found["kernels"]) == 16
    rows = [line for line in page.partition("## Decisions")[2].splitlines() if line.startswith("| ")][2:]
    assert len(rows) == len(gpu_day.DECISIONS)
    missing = {part for row in rows for part in re.findall(r"`(\w+)`: missing", row)}
    assert missing == {name for name, result in results.items() if result["state"] != "done"}, "each part decides something"


def test_parts_that_fail_hang_die_or_are_stopped_lose_nothing_and_the_next_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_day, "WORKER", ("-c", BAD))
    monkeypatch.setattr(subprocess, "Popen", Hurried)
    monkeypatch.setitem(gpu_day.NEEDS, "nf4", ["nowhere"])
    monkeypatch.setenv("DAY", str(os.getpid()))
    wanted = {"lora": "FAILED: ended with 1", "graphs": "FAILED: killed at its limit of 480 s"}
    wanted |= {"memory": "FAILED: died of SIGSEGV", "nf4": "left out: nowhere is not installed", "resume": "done"}
    code, results, page = day(tmp_path, *wanted)
    assert code == 1 and "lora, graphs, memory failed" in capsys.readouterr().err
    assert {name: result["state"] for name, result in results.items()} == wanted
    assert all(state in page for state in wanted.values())
    assert [result["found"] for name, result in results.items() if name != "nf4"] == [FIRST] * 4
    said = [str(results[name]["log"]) for name in ("lora", "graphs", "memory")]
    assert "no kernel image is available" in said[0] and all("in part" in text for text in said), "it says where it was"
    # Stopped in the middle; then the same command runs what is missing and overwrites nothing.
    code, stopped, _ = day(tmp_path, "resume", "scoring", "float16")
    assert code == 1 and stopped["resume"] == results["resume"] and "float16" not in stopped
    assert stopped["scoring"]["state"] == "FAILED: stopped from outside" and stopped["scoring"]["found"] == FIRST
    late = day(tmp_path, "scoring", "float16", minutes=0)[1]
    assert late["scoring"] == stopped["scoring"] and late["float16"]["state"] == "left out: the 0 minutes are over"
    assert day(tmp_path, "graphs", minutes=9)[1]["graphs"]["state"].startswith("FAILED: killed at its limit of 480 s")
    assert day(tmp_path, "graphs", minutes=7)[1]["graphs"]["state"] == "cut: the 7 minutes are over"
    monkeypatch.setattr(gpu_day, "versions", lambda: {"torch": "another"})
    assert gpu_day.main(["--device", "cpu", "--out", str(tmp_path)]) == 2 and "give another folder" in capsys.readouterr().err


def test_a_part_ends_with_the_command_that_is_killed(tmp_path):
    code = f"from benchmarks import gpu_day; gpu_day.WORKER = ('-c', {BAD!r}); "
    code += f"gpu_day.main(['--device', 'cpu', '--out', {str(tmp_path)!r}, '--parts', 'float16'])"
    command = Forked([sys.executable, "-c", code])
    path, deadline = tmp_path / "float16.json", time.monotonic() + 100
    while not (path.exists() and (worker := json.loads(path.read_text())["found"].get("process"))):
        assert time.monotonic() < deadline and command.poll() is None
        time.sleep(0.05)
    command.kill()
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_wheels_are_of_all_that_is_needed_but_torch():
    names = {line.partition("==")[0] for line in gpu_day.needed("3.12")}
    assert {"transformers", "lightning", "trl", "bitsandbytes", "numpy", "tokenizers"} <= names
    assert not names & {"torch", "triton", "hybrid-lightning", "pytest"} and not any(name.startswith("nvidia") for name in names)
