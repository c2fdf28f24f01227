"""LoRA, hybrid and full fine-tuning: what a worker counts, what is made of known numbers, and one small comparison."""

import json

import pytest
import torch

from benchmarks.speed import methods, run_methods
from benchmarks.training import tensor_bytes

GIB = 2**30


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
    scored = {"scoring_seconds": scoring, "calibration": {"sequences": 8, "prompts": 2}, "full_modules": 3, "modules": 30}
    return {"trained_weight_bytes": trained_weight_bytes, "trainable_parameters": trained_weight_bytes // 4, **scored}


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


def summarize(device="cpu", **changed):
    found = measured(**changed)
    for step in (step for done in found["steps"].values() for step in done):
        step["memory"]["cuda_peak"] = step["memory"]["cpu_peak"] // 2
    return methods.summarize(methods.chosen_workload(methods.build_parser().parse_args([])), found, device)


def test_known_numbers():
    result = summarize()
    hybrid, fft = result["summary"]["hybrid"], result["summary"]["fft"]
    assert hybrid["time_over_lora"] == pytest.approx({"median": 1.1, "min": 1.0, "max": 1.1})
    assert hybrid["seconds"]["median"] == 3.3
    assert (hybrid["state_total_bytes"], fft["state_total_bytes"]) == (GIB, 7 * GIB)
    assert hybrid["state_over_fft"] == pytest.approx(1 / 7)
    assert (fft["peak_bytes"], fft["peak_used_bytes"]) == (11 * GIB, 10 * GIB)
    found = {name: goal["measured"] for name, goal in result["goals"].items()}
    assert found == pytest.approx({"time": 1.1, "state": 1 / 7, "peak": 0.4, "scoring": 2.0})
    assert all(goal["reached"] for goal in result["goals"].values())
    assert not summarize(hybrid_seconds=(1.0, 2.4, 3.6, 4.0))["goals"]["time"]["reached"]
    on_gpu = summarize("cuda")["summary"]["fft"]
    assert on_gpu["peak_used_bytes"] == on_gpu["peak_bytes"] == 11 * GIB // 2, "where nothing is mapped"


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
    assert scoring["hybrid"] > 2 * scoring["lora"]
