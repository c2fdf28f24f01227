import re
from dataclasses import replace
from pathlib import Path

import pytest
from cli_runs import assert_refused, done, run
from rich import get_console
from tiny_memory import Case
from tiny_models import build_model

from hybrid_lightning.adapters import LoraSettings, ModuleBudget, find_candidates
from hybrid_lightning.adapters.budgets import plan_of_budget
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.memory import DDP, FSDP2, SingleDevice, TrainerFlags
from hybrid_lightning.memory.fitting import room
from hybrid_lightning.sharding import FSDP2Strategy

STRATEGIES = Path(__file__).parents[2] / "configs" / "strategy"
FSDP2_OF_2 = ("--config", STRATEGIES / "fsdp.yaml", "--trainer.devices=2")
FLAGS = ["--trainer.accelerator=gpu", "--trainer.num_nodes=2", "--trainer.devices=2", "--trainer.precision=bf16-mixed"]


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    # The console is the process's own; it may have been made, with a width, by another test.
    monkeypatch.setattr(get_console(), "_width", 220)
    monkeypatch.setattr(get_console(), "_height", 50)


def cells(result):
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.out.splitlines() if line.startswith("│")]
    return {line[0]: line[1:] for line in lines}


def test_no_weights_are_needed(folder):
    result = done(folder, "plan", "--config", "t.yaml")
    found = cells(result)
    assert found["tensors together"] and len(found["weights"]) == 3 and "prompts of 4 tokens" in result.out
    assert (
        "prompts of 4 tokens, completions of 6" in result.out
        and "every completion has all 6 tokens, that every one" in result.out
    )
    assert re.search(
        r"Fits: hybrid 10% takes up to about [\d.]+ MiB if every completion has all 6 tokens, most of it", result.out
    )
    assert re.search("FFT.*LoRA.*hybrid 10%", result.out) and found["calibrating"][:2] == ["-", "-"]
    assert not (folder / "runs").exists() and "rollout engine" not in result.out
    assert found["process"] and "each process takes this much" in result.out
    assert re.search("Fits: .* for Python and libraries$", result.out, re.MULTILINE), "of the memory of this machine"


@pytest.mark.parametrize("offload", [False, True])
def test_devices_that_are_not_here(folder, offload):
    strategy = ["--config", STRATEGIES / "fsdp.yaml", *["--trainer.strategy.cpu_offload=true"] * offload]
    result = done(folder, "plan", "--config", "t.yaml", *strategy, *FLAGS, "--prompt_tokens=50", "--model.dtype=bfloat16")
    name = "FSDP2 with CPU offload" if offload else "FSDP2"
    assert f"{name} on 4 devices, accelerator, prompts of 50 tokens" in result.out and "process" not in cells(result)
    assert "Weights from other devices: " in result.out
    host = r"on the host take, for each device: FFT [\d.]+ MiB, LoRA [\d.]+ MiB, hybrid"
    assert bool(re.search(host, result.out)) is offload is (cells(result)["optimizer"][1] == "-" == cells(result)["weights"][1])


def test_a_plan_that_is_there_is_planned_for(folder, tmp_path):
    candidates = find_candidates(build_model("llama", num_hidden_layers=1))
    plan = plan_of_budget(candidates, ModuleBudget(0.3), LoraSettings(rank=3))
    plan.save(tmp_path / "plan.json")
    result = done(folder, "plan", "--config", "t.yaml", f"--adapter.plan={tmp_path / 'plan.json'}")
    assert cells(result)["trained numbers"][2] == f"{plan.trainable_parameters():,}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt_tokens=0"], "prompt_tokens must be at least 1, got 0"),
        (["--device_gib=0"], "device_gib must be a positive number, got 0"),
        (["--data.source.train=missing.jsonl"], "give --prompt_tokens"),
        ([*FSDP2_OF_2, "--model.optimizer=bitsandbytes.optim.AdamW8bit"], "AdamW8bit does not work with FSDP2"),
    ],
)
def test_what_is_wrong_is_said_in_the_last_line(folder, options, message):
    assert_refused(run(folder, "plan", "--config", "t.yaml", *options), message)


GPU = ["--trainer.accelerator=gpu", "--trainer.devices=1", "--prompt_tokens=20", "--model.sampler.max_new_tokens=100"]


def verdict_of(result):
    (found,) = re.findall(
        r"((?:(?:Fits|Does not fit): )?LoRA takes up to ([\d.]+) MiB if .*, most of it while (\w+)) ", result.out
    )
    return found


def test_a_run_that_does_not_fit_is_told_the_fewest_changes_with_which_it_does(folder):
    given = [*GPU, "--adapter.budget.share=0", "--model.prompts_per_rollout=64", "--model.max_tokens_per_micro_batch=130"]
    large = run(folder, "plan", "--config", "t.yaml", *given)
    text, mib, phase = verdict_of(large)
    assert phase == "generating" and "give --device_gib" in large.out, text
    device = f"--device_gib={0.5 + 0.6 * float(mib) / 1024}"  # a context takes 0.5 GiB
    result = done(folder, "plan", "--config", "t.yaml", *given, device)
    assert verdict_of(result)[0].startswith("Does not fit") and "--fit looks for" in result.out
    result = done(folder, "plan", "--config", "t.yaml", *given, device, "--fit")
    (overrides,) = re.findall(r"Add to the command: (.*)", result.out)
    assert overrides == "--model.prompts_per_rollout=32" and "costs fewer problems in each step" in result.out
    assert len(cells(result)["KV cache"]) == 2 and "Fits: LoRA takes" in result.out


def test_what_is_not_enough_is_an_error(folder):
    full = ["--adapter.budget.share=1.0", "--model.dtype=bfloat16", "--trainer.precision=bf16-mixed", "--fit"]
    few = ["--model.prompts_per_rollout=4", "--adapter.rank=4", "--trainer.limit_val_batches=0"]  # none of them can be less
    given = [*GPU, *full, *few, "--model.max_tokens_per_micro_batch=130", "--model.loss.kl_coef=0.1", "--device_gib=0.5001"]
    result = run(folder, "plan", "--config", "t.yaml", *given)
    assert_refused(result, "no changes make this model fit")
    assert "keep_start_weights=false" not in result.out, "the KL term needs start weights"
    assert re.findall(r"^--(\S+?)=\S+ .*costs ", result.out, re.MULTILINE)[-1] == "adapter.budget.share", result.out


OFFLOADED = FSDP2Strategy(cpu_offload=True)


@pytest.mark.parametrize(
    ("flags", "sharding"),
    [
        ({}, SingleDevice()),
        ({"devices": 4}, DDP(4)),
        ({"devices": "2", "num_nodes": 3, "strategy": "ddp"}, DDP(6)),
        ({"devices": [0, 2], "strategy": "fsdp"}, FSDP2(2)),
        ({"devices": "1,3,5", "strategy": OFFLOADED}, FSDP2(3)),  # the host has one memory
        ({"devices": 2, "strategy": OFFLOADED, "accelerator": "cuda"}, FSDP2(2, cpu_offload=True)),
        ({"devices": 2, "strategy": FSDP2Strategy(), "accelerator": "cuda", "limit_val_batches": 0}, FSDP2(2)),
        ({"strategy": "fsdp2"}, "cannot plan memory for trainer.strategy=fsdp2"),
    ],
)
def test_flags_of_the_trainer(flags, sharding):
    flags = {"accelerator": "cpu", "precision": "bf16-mixed", **flags}
    if isinstance(sharding, str):
        with pytest.raises(ConfigError, match=sharding):
            TrainerFlags.of(flags)
        return
    found = TrainerFlags.of({**flags, "accumulate_grad_batches": 3})
    assert found.sharding == sharding
    assert found.on_cpu is (flags["accelerator"] == "cpu") and found.precision == "bf16-mixed"
    assert found.validates is ("limit_val_batches" not in flags) and found.accumulate_grad_batches == 3


def test_where_a_device_has_a_memory_it_is_a_gpu():
    flags = TrainerFlags.of({"accelerator": "auto", "devices": 1}, device_gib=24)
    settings = replace(Case().settings(), flags=flags)
    assert not flags.on_cpu and room(settings) == pytest.approx(0.95 * 24 * 2**30), "its allocator cannot use all"
