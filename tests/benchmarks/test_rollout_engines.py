"""The comparison of rollout engines: its measurements, its server and its tables. Needs no vLLM."""

import json
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from benchmarks.commands import BenchmarkError
from benchmarks.vllm import rollout_engines, run_engines, server
from hybrid_lightning.rollout.interface import WeightsVersion

MIB = 2**20


def test_an_update_is_timed_and_repeated_under_another_version():
    def update(weights, model, everything):
        time.sleep(0.01)
        calls.append((str(weights.version), model, everything))

    calls, engine = [], SimpleNamespace(update=update)
    watch = run_engines.Watch(engine)
    engine.update(SimpleNamespace(version=WeightsVersion(3, "a")), "model", False)
    assert watch.seconds() >= 0.01 and watch.seconds() == 0
    assert watch.repeat(everything=True) >= 0.01
    assert calls == [("3-a", "model", False), (f"{3 + 2**20}-a", "model", True)]
    assert watch.seconds() == 0, "only updates of the run count"


def test_a_server_that_does_not_start_is_said_with_its_last_line(monkeypatch, tmp_path):
    monkeypatch.setattr(server, "command", lambda *_: [sys.executable, "-c", "raise SystemExit('no room')"])
    with (
        pytest.raises(BenchmarkError, match="the vLLM server ended while it started: no room"),
        server.serving(tmp_path, "float32", "cpu", 1, None, tmp_path / "log"),
    ):
        pytest.fail("it is not ready")


def steps(rate, step_s, difference, updates=None):
    """A warm-up and two rounds of 10 tokens each; the second takes twice as long."""
    found = []
    for number, slow in enumerate((1, 1, 2)):
        apart = {"mean": difference, "max": 10 * difference * slow, "tokens": 10}
        found.append(
            {"tokens": 10, "generate_s": slow * 10 / rate, "step_s": slow * step_s, "difference": apart, "update_s": 7.5}
        )
        found[-1]["peak"] = (number + 1) * 100 * MIB
        if updates:
            found[-1] |= {"update_s": updates / 4 if number else 7.5, "update_all_s": updates}
    return found


STEPS = {"sampler": steps(100, 1.0, 1e-7), "vllm": steps(200, 2.0, 1e-6, 0.4), "server": steps(50, 3.0, 1e-6, 0.8)}
MEASURED = {"steps": STEPS, "server_peak": 500 * MIB}


def test_known_numbers():
    summary = {engine: rollout_engines.summarize(done) for engine, done in STEPS.items()}
    vllm = summary["vllm"]
    assert vllm["tokens_per_s"] == {"median": 150, "min": 100, "max": 200} and vllm["step_s"]["median"] == 3
    assert (vllm["peak"], vllm["start_s"]) == (300 * MIB, 7.5)
    assert (vllm["difference_mean"], vllm["difference_max"]) == pytest.approx((1e-6, 2e-5))
    assert (vllm["update_all_s"]["median"], vllm["update_changed_s"]["median"]) == (0.4, 0.1)
    text = rollout_engines.tables({"embedded_float32": {**MEASURED, "summary": summary}})
    speed, sync = "150 (100-200) | 3.00 (2.00-4.00)", "0.400 (0.400-0.400) | 0.100 (0.100-0.100) | 7.5"
    assert f"| embedded_float32 | `VLLMSampler` | {speed} | {sync} | 300 | 1.0e-06 | 2.0e-05 |" in text
    assert "| 300 + 500 |" in text, "memory of the server and of the training process"
    assert "| `Sampler`, ours | 75 (50-100) | 1.50 (1.00-2.00) | - | - | - | 300 |" in text


def test_measurements_are_added_to_earlier_ones(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(rollout_engines, "find_spec", lambda name: name)
    monkeypatch.setattr(rollout_engines, "prepared", lambda loads, plan: nullcontext([None] * len(loads)))
    monkeypatch.setattr(rollout_engines, "measure", lambda *_: MEASURED)
    for name, value in rollout_engines._ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    for dtype in ("float32", "bfloat16"):
        assert rollout_engines.main(["--model", "embedded", "--dtype", dtype, "--out", str(tmp_path)]) == 0
    text = (tmp_path / "rollout_engines.md").read_text()
    assert text.index("| embedded_float32 |") < text.index("| embedded_bfloat16 |") and text in capsys.readouterr().out
    assert list(json.loads((tmp_path / "rollout_engines.json").read_text())) == ["embedded_float32", "embedded_bfloat16"]
