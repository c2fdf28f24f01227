"""LoRA, hybrid and full fine-tuning: the tables of known numbers, and one small comparison."""

import json

import pytest

from benchmarks.speed import methods

GIB = 2**30


def steps(seconds, peaks, *states):
    """With these seconds, peaks in GiB, and GiB of the trainable state at the end."""
    state = {"state_bytes": {part: int(GIB * value) for part, value in zip(methods.PARTS, states, strict=True)}}
    taken = [{"seconds": s, "processor_seconds": s, "tokens": 8, "rows": 2, **state} for s in seconds]
    memory = [{"cpu": 0, "cpu_peak": peak * GIB, "cuda_peak": peak * GIB // 2} for peak in peaks]
    return [{**step, "memory": held} for step, held in zip(taken, memory, strict=True)]


def summarize(device="cpu"):
    """FFT's float32 weights, 2 GiB, took the place of 1 GiB of the file."""
    weights = {"lora": GIB // 2, "hybrid": GIB // 4, "fft": 2 * GIB}
    scored = {"calibration": {"sequences": 8, "prompts": 2}, "full_modules": 3, "modules": 30}
    facts = {name: {"trained_weight_bytes": size, "scoring_seconds": 0.0, **scored} for name, size in weights.items()}
    facts["hybrid"]["scoring_seconds"] = 6.6
    found = {
        "lora": steps([90.0, 2.0, 3.0, 4.0], [2, 2, 3, 3], 0.5, 0.5, 1),
        "hybrid": steps([90.0, 2.2, 3.3, 4.0], [3, 3, 4, 4], 0.25, 0.25, 0.5),
        "fft": steps([90.0, 6.0, 6.0, 6.0], [8, 9, 11, 11], 1, 2, 4),
    }
    workload = methods.chosen_workload(methods.build_parser().parse_args([]))
    return methods.summarize(workload, {"facts": facts, "steps": found}, device)


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
    on_gpu = summarize("cuda")["summary"]["fft"]
    assert on_gpu["peak_used_bytes"] == on_gpu["peak_bytes"] == 11 * GIB // 2, "where nothing is mapped"


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
    assert [fact["full_modules"] for fact in written["facts"].values()] == [0, 3, 28]
    assert written["facts"]["hybrid"]["scoring_seconds"] > 2 * written["facts"]["lora"]["scoring_seconds"]
