"""LoRA, hybrid and full fine-tuning: what a worker counts, what is made of known numbers, and one small comparison."""

import json

import pytest
import torch

from benchmarks.speed import methods, run_methods
from benchmarks.training import tensor_bytes

GIB = 2**30


def test_completions_have_the_full_length_whatever_it_is():
    default = methods.chosen_workload(methods.build_parser().parse_args([]))
    assert (default.prompts, default.samples, default.prompt_tokens, default.max_new_tokens) == (4, 8, 128, 64)
    asked = ["--prompts", "2", "--samples", "3", "--prompt-tokens", "9", "--max-new-tokens", "5", "--model", "embedded"]
    load = methods.chosen_workload(methods.build_parser().parse_args(asked))
    assert (load.prompts, load.samples, load.prompt_tokens, load.max_new_tokens, load.model) == (2, 3, 9, 5, "embedded")
    assert default.full_length and load.full_length


# ---- what a worker counts


def test_bytes_are_those_of_storages_each_once():
    values = torch.zeros(10)
    tied = torch.nn.Linear(3, 4, bias=False)
    model = torch.nn.ModuleList([tied, torch.nn.Linear(3, 4, dtype=torch.bfloat16)])
    model.append(torch.nn.Linear(3, 4, bias=False))
    model[2].weight = tied.weight
    model.register_buffer("places", torch.zeros(5, dtype=torch.int64))
    assert tensor_bytes([values, values[:3], values.view(2, 5), torch.zeros(2, dtype=torch.float64)]) == 40 + 16
    assert run_methods.model_bytes(model) == 3 * 4 * 4 + (3 * 4 + 4) * 2 + 5 * 8


def test_methods_differ_in_the_budget_and_the_start_weights_alone():
    adapters = {name: run_methods.build_adapter(name, 4, 8) for name in methods.METHODS}
    assert {name: adapter.budget.share for name, adapter in adapters.items()} == {"lora": 0, "hybrid": 0.1, "fft": 1}
    assert [name for name, adapter in adapters.items() if not adapter.keep_start_weights] == ["fft"]
    assert {(adapter.lora.rank, adapter.lora.alpha) for adapter in adapters.values()} == {(4, 8)}


# ---- from steps to numbers


def steps(seconds, peaks, state):
    return [
        {
            "seconds": s,
            "processor_seconds": s,
            "tokens": 8,
            "rows": 2,
            "memory": {"cpu": 0, "cpu_peak": peak * GIB},
            "state_bytes": dict(zip(methods.PARTS, state, strict=True)),
        }
        for s, peak in zip(seconds, peaks, strict=True)
    ]


def facts(trained_weight_bytes, scoring=0.0):
    return {
        "memory": {"cpu": GIB},
        "trained_weight_bytes": trained_weight_bytes,
        "trainable_parameters": trained_weight_bytes // 4,
        "scoring_seconds": scoring,
        "calibration": {"sequences": 8, "prompts": 2},
        "full_modules": 3,
        "modules": 30,
    }


def measured(hybrid_seconds=(90.0, 2.2, 3.3, 4.0), scoring=6.6):
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
    return methods.chosen_workload(methods.build_parser().parse_args([]))


def test_known_numbers(load):
    result = methods.summarize(load, measured(), "cpu")
    hybrid, fft = result["summary"]["hybrid"], result["summary"]["fft"]
    assert hybrid["time_over_lora"] == pytest.approx({"median": 1.1, "min": 1.0, "max": 1.1})
    assert hybrid["seconds"]["median"] == 3.3
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
    fft = methods.summarize(load, on_gpu, "cuda")["summary"]["fft"]
    assert fft["peak_used_bytes"] == fft["peak_bytes"] == 11 * GIB // 2


def test_all_goals_are_reached_or_one_is_missed(load):
    goals = methods.summarize(load, measured(), "cpu")["goals"]
    assert {name: goal["at_most"] for name, goal in goals.items()} == {"time": 1.15, "state": 0.25, "peak": 0.65, "scoring": 2.0}
    assert all(goal["reached"] for goal in goals.values())
    for name, changed in (("time", {"hybrid_seconds": (1.0, 2.4, 3.6, 4.0)}), ("scoring", {"scoring": 6.8})):
        goals = methods.summarize(load, measured(**changed), "cpu")["goals"]
        assert not goals[name]["reached"]


def test_the_tables_show_them(load):
    lines = methods.tables(methods.summarize(load, measured(), "cpu")).splitlines()
    state = "256.0 | 256.0 | 512.0 | 1024.0 | 0.143 | 4.00 | 0.40"
    assert f"| hybrid 10% | 3.30 | 1.10 (1.00-1.10) | 67.1 | {state} |" in lines
    assert "| trainable state, hybrid / FFT | 0.14 | 0.25 | yes |" in lines
    assert lines[-1] == "Scoring 30 modules on 8 completions of 2 prompts took 6.60 s; 3 are fully trained."


# ---- the whole


@pytest.mark.usefixtures("forked")
def test_a_small_comparison_from_beginning_to_end(capsys, tmp_path):
    sizes = ["--prompts", "2", "--samples", "2", "--prompt-tokens", "8", "--max-new-tokens", "5"]
    code = methods.main(["--model", "embedded", "--rounds", "1", "--threads", "1", *sizes, "--out", str(tmp_path)])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert [line.split(" | ")[0] for line in out.splitlines()[2:5]] == ["| LoRA", "| hybrid 10%", "| FFT"]
    written = json.loads((tmp_path / "methods.json").read_text())
    turns = [line.split(" ")[-7] for line in err.splitlines() if ", warm-up:" in line or ", round " in line]
    assert turns == ["lora", "hybrid", "fft"] * 2
    for name, fact in written["facts"].items():
        warm_up, step = written["steps"][name]
        assert (warm_up["optimizer_steps"], step["optimizer_steps"]) == (1, 2)
        assert (step["tokens"], step["rows"]) == (20, 4)
        assert written["summary"][name]["seconds"]["median"] == step["seconds"]
        assert written["summary"][name]["peak_bytes"] == step["memory"]["cpu_peak"] >= warm_up["memory"]["cpu_peak"]
        trained = 4 * fact["trainable_parameters"]
        assert fact["trained_weight_bytes"] == trained
        state = step["state_bytes"]
        assert state["gradients"] == trained
        assert 0 < state["optimizer"] - 2 * trained < 0.01 * trained  # two moments of each, and the number of steps
        assert state["extra_weights"] == (trained // 2 if name == "fft" else trained)  # in the place of as many bfloat16 ones
    full = {name: fact["full_modules"] for name, fact in written["facts"].items()}
    assert full == {"lora": 0, "hybrid": 3, "fft": 28}
    scoring = {name: fact["scoring_seconds"] for name, fact in written["facts"].items()}
    assert scoring["hybrid"] > 10 * scoring["lora"]
