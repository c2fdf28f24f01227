"""Each config that names the hub runs from its hub ids to its end, then once more from the cache alone."""

import json
from pathlib import Path

import pytest
import yaml
from hub_server import MEMBER

from hybrid_lightning.adapters.plan import AdapterPlan

CONFIGS = Path(__file__).parents[2] / "configs"
# All that is lowered, of a config that trains and of one that tests. The rest is as it stands: prompts and samples of a rollout,
# minibatches, accumulation, calibration, samples of a validation, precision, dtype, LoRA's rank.
STEPS = 4  # one rollout
LOWERED = {
    "fit": {"model.sampler.max_new_tokens": 6, "trainer.max_steps": STEPS, "data.validation_prompts": 4},
    "test": {"model.sampler.max_new_tokens": 6},
}
# And with overlays: these are about data, loss and adapter.
WITH_OVERLAYS = {"model.prompts_per_rollout": 4}
# Command, config and its overlays, each of which is in one at least.
RUNS = [
    ("fit", "gsm8k_qwen3"),
    ("fit", "leetcode_qwen3"),
    ("fit", "qwen3", "data/dapo_math", "loss/dapo", "adapter/lora"),
    ("fit", "qwen3", "data/gsm8k", "loss/dr_grpo", "adapter/dora"),
    ("fit", "qwen3", "data/leetcode", "loss/grpo", "adapter/full"),
    ("fit", "qwen3", "data/math", "loss/gspo", "adapter/lora_mlp"),
    ("fit", "qwen3", "data/mmlu_pro", "loss/top_entropy"),
    ("fit", "qwen3", "data/mixture"),
    ("test", "evaluate", "evaluation/benchmarks"),
]
SHARDED = ("fit", "qwen3", "strategy/fsdp2")  # as qwen3.yaml says; on two processes


def arguments(command, *configs):
    """Of the command line: the configs and what is lowered."""
    trainer = yaml.safe_load((CONFIGS / f"{configs[0]}.yaml").read_text())["trainer"]
    lowered = dict(LOWERED[command])
    if command == "fit":
        # A validation at the end; it counts micro-batches.
        lowered["trainer.val_check_interval"] = STEPS * trainer.get("accumulate_grad_batches", 1)
        lowered |= WITH_OVERLAYS if configs[1:] else {}
    else:
        lowered["model.model"] = "Qwen/Qwen3-8B"  # a required value
    given = [part for name in configs for part in ("--config", str(CONFIGS / f"{name}.yaml"))]
    return [command, *given, *(f"--{name}={value}" for name, value in lowered.items())]


def last_run(folder, config):
    runs = folder / "runs" / config
    return max(runs.iterdir(), key=lambda path: int(path.name.removeprefix("version_")))


# What the cache alone has to give is there once a step has begun.
LEAST = {
    "fit": ("--trainer.max_steps=1", "--trainer.num_sanity_val_steps=0", "--trainer.limit_val_batches=0"),
    "test": ("--trainer.limit_test_batches=1",),
}


def check(run, result, folder):
    assert result.code == 0, result.err
    command, config = run[:2]
    report = last_run(folder, config)
    if command == "test":
        evaluation = json.loads((report / "evaluation.json").read_text())
        problems = {name: values["problems"] for name, values in evaluation["sets"].items()}
        assert problems == {"aime24": 8, "aime25": 8, "leetcode": 3, "mmlu_pro": 40}
        return
    summary = json.loads((report / "summary.json").read_text())
    assert summary["steps"] == STEPS and 0 <= summary["accuracy_after"] <= 1
    assert (report / "checkpoints" / "last.ckpt").is_file()
    for name in run:
        if name.startswith("adapter/"):
            check_plan(AdapterPlan.load(report / "plan.json"), name.removeprefix("adapter/"))


def check_plan(plan, adapter):
    """All modules are trained one way."""
    assert len(plan.full_modules) == (len(plan.candidates) if adapter == "full" else 0)
    assert plan.lora.use_dora is (adapter == "dora")
    ranks = {module.name: plan.lora_of(module).rank for module in plan.candidates if module.mode == "lora"}
    attention = {name: rank for name, rank in ranks.items() if ".self_attn." in name}
    assert set(attention.values()) <= {1 if adapter == "lora_mlp" else plan.lora.rank}
    assert {rank for name, rank in ranks.items() if name not in attention} <= {plan.lora.rank} and plan.lora.rank > 1


@pytest.mark.parametrize("run", RUNS, ids=lambda run: "+".join(run[1:]))
def test_it_runs_from_its_hub_ids_and_then_from_the_cache(run, hub, online, offline):
    check(run, online(*arguments(*run)), online.folder)
    asked = len(hub.requests)
    result = offline(*arguments(*run), *LEAST[run[0]])
    assert result.code == 0, result.err
    report = last_run(offline.folder, run[1])
    if run[0] == "fit":
        assert json.loads((report / "summary.json").read_text())["steps"] == 1
    else:
        assert (report / "evaluation.json").is_file()
    assert len(hub.requests) == asked, "offline, the hub was asked"


def test_every_config_that_names_the_hub_runs_here():
    """And each overlay over them, but for the strategies, whose own tests run them on any model."""
    run = {name for _, *names in [*RUNS, SHARDED] for name in names}
    overlays = {
        f"{kind}/{path.stem}" for kind in ("loss", "data", "adapter", "evaluation") for path in (CONFIGS / kind).glob("*.yaml")
    }
    from_hub = {path.stem for path in CONFIGS.glob("*.yaml") if "Qwen/" in path.read_text()}
    assert run == overlays | from_hub | {"evaluate", "strategy/fsdp2"}


def test_it_runs_sharded_over_two_processes_and_then_from_the_cache(hub, online, offline):
    command, asked = [*arguments(*SHARDED), "--trainer.devices=2", "--trainer.logger.name=sharded"], 0
    for commands in (online, offline):
        asked = len(hub.requests)
        done = commands(*command, ranks=2)
        assert done.code == 0, done.err[-3000:]
        assert "Starting with 2 processes" in commands.log()
        (run,) = (commands.folder / "runs" / "sharded").iterdir()
        assert json.loads((run / "summary.json").read_text())["steps"] == STEPS
    assert len(hub.requests) == asked, "offline, the hub was asked"


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("meta-llama/Llama-3.2-1B-Instruct", []),
        ("google/gemma-2-2b-it", ["--data.format.system_prompt=null", "--data.format.template=Solve this. {question}"]),
    ],
)
def test_other_families_run_once_their_terms_are_accepted(model, options, online):
    few = ["--model.prompts_per_rollout=4", "--adapter.calibration_prompts=8"]
    result = online(*arguments("fit", "gsm8k_qwen3"), f"--model.model={model}", *few, *options, token=MEMBER)
    check(("fit", "gsm8k_qwen3"), result, online.folder)
    assert json.loads((last_run(online.folder, "gsm8k_qwen3") / "plan.json").read_text())["model"] == model


def test_what_was_trained_is_tested_and_exported_without_a_network(offline):
    """By the hub id that the run's config names."""
    offline(*arguments("fit", "gsm8k_qwen3"), *LEAST["fit"], "--model.prompts_per_rollout=4", "--adapter.calibration_prompts=8")
    folder = last_run(offline.folder, "gsm8k_qwen3")
    trained = ["--config", folder / "config.yaml", "--ckpt_path", folder / "checkpoints" / "last.ckpt"]
    assert offline("test", *trained).code == 0
    result = offline("export", *trained, "--folder", "exported")
    assert result.code == 0, result.err
    assert json.loads((offline.folder / "exported" / "generation_config.json").read_text())["eos_token_id"] != []


def test_the_hub_is_not_asked_where_everything_is_local(hub, online):
    asked = len(hub.requests)
    without = ("--trainer.num_sanity_val_steps=0", "--trainer.limit_val_batches=0")
    result = online("fit", "--config", CONFIGS / "gspo.yaml", "--trainer.max_steps=1", *without)
    assert result.code == 0, result.err
    assert len(hub.requests) == asked
