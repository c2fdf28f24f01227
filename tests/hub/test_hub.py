"""Each config that names the hub runs from its hub ids and then from the cache; what cannot be had is said in one line, soon."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hub_contents import fill, fill_with_faults
from hub_runs import Commands
from hub_server import MEMBER, REVOKED, STRANGER, Hub

from hybrid_lightning.adapters import AdapterPlan

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    hub = fill_with_faults(fill(Hub(), folder), folder).start()
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def commands(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Commands, Commands]]:
    """Two processes with one cache, of which the second is offline by its environment."""
    home = tmp_path_factory.mktemp("home")
    online = Commands(hub.endpoint, home, tmp_path_factory.mktemp("online"))
    offline = Commands(hub.endpoint, home, tmp_path_factory.mktemp("offline"), HF_HUB_OFFLINE="1")
    yield online, offline
    online.close()
    offline.close()


@pytest.fixture
def online(commands: tuple[Commands, Commands]) -> Commands:
    return commands[0]


@pytest.fixture
def offline(commands: tuple[Commands, Commands]) -> Commands:
    return commands[1]


# ---- what can be had

# All that is lowered, of a config that trains and of one that tests. The rest is as it stands: samples of a rollout, minibatches,
# accumulation, precision, dtype, LoRA's rank.
LOWERED = {
    "fit": {"model.sampler.max_new_tokens": 6, "model.prompts_per_rollout": 4, "trainer.max_steps": 1}
    | {"adapter.calibration_prompts": 4, "data.validation_prompts": 4},
    "test": {"model.sampler.max_new_tokens": 6, "model.eval_samples": 2},
}
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
# Which of them have all data sets and models that there are: these run once more, from the cache.
AGAIN = {"gsm8k_qwen3", "data/dapo_math", "data/math", "data/mixture", "evaluate"}
SHARDED = ("fit", "qwen3", "strategy/fsdp2")  # as qwen3.yaml says; on two processes


def arguments(command, *configs):
    """Of the command line: the configs and what is lowered."""
    trainer = yaml.safe_load((CONFIGS / f"{configs[0]}.yaml").read_text())["trainer"]
    lowered = dict(LOWERED[command])
    if command == "fit":
        # A validation at the end; it counts micro-batches.
        lowered["trainer.val_check_interval"] = trainer.get("accumulate_grad_batches", 1)
    else:
        lowered["model.model"] = "Qwen/Qwen3-8B"  # a required value
    given = [part for name in configs for part in ("--config", str(CONFIGS / f"{name}.yaml"))]
    return [command, *given, *(f"--{name}={value}" for name, value in lowered.items())]


def last_run(folder, config):
    runs = folder / "runs" / config
    return max(runs.iterdir(), key=lambda path: int(path.name.removeprefix("version_")))


# What the cache alone has to give is there once a step has begun.
LEAST = {
    "fit": ("--adapter.budget.share=0", "--trainer.num_sanity_val_steps=0", "--trainer.limit_val_batches=0"),
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
    assert summary["steps"] == 1 and 0 <= summary["accuracy_after"] <= 1
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
    if not AGAIN & set(run):
        return
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
    kinds = ("loss", "data", "adapter", "evaluation")
    overlays = {f"{kind}/{path.stem}" for kind in kinds for path in (CONFIGS / kind).glob("*.yaml")}
    from_hub = {path.stem for path in CONFIGS.glob("*.yaml") if "Qwen/" in path.read_text()}
    assert run == overlays | from_hub | {"evaluate", "strategy/fsdp2"}


def test_it_runs_sharded_over_two_processes_and_then_from_the_cache(hub, online, offline):
    command, asked = [*arguments(*SHARDED), "--trainer.devices=2", "--trainer.logger.name=sharded"], 0
    for commands, least in ((online, ()), (offline, LEAST["fit"])):
        asked = len(hub.requests)
        done = commands(*command, *least, ranks=2)
        assert done.code == 0, done.err[-3000:]
        assert "Starting with 2 processes" in commands.log()
        (run,) = (commands.folder / "runs" / "sharded").iterdir()
        assert json.loads((run / "summary.json").read_text())["steps"] == 1
    assert len(hub.requests) == asked, "offline, the hub was asked"


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("meta-llama/Llama-3.2-1B-Instruct", []),
        ("google/gemma-2-2b-it", ["--data.format.system_prompt=null", "--data.format.template=Solve this. {question}"]),
    ],
)
def test_other_families_run_once_their_terms_are_accepted(model, options, online):
    result = online(*arguments("fit", "gsm8k_qwen3"), f"--model.model={model}", *options, token=MEMBER)
    check(("fit", "gsm8k_qwen3"), result, online.folder)
    assert json.loads((last_run(online.folder, "gsm8k_qwen3") / "plan.json").read_text())["model"] == model


def test_what_was_trained_is_tested_and_exported_without_a_network(offline, cached):
    """By the hub id that the run's config names."""
    offline(*arguments("fit", "gsm8k_qwen3"), *LEAST["fit"])
    folder = last_run(offline.folder, "gsm8k_qwen3")
    trained = ["--config", folder / "config.yaml", "--ckpt_path", folder / "checkpoints" / "last.ckpt"]
    assert offline("test", *trained).code == 0
    result = offline("export", *trained, "--folder", "exported")
    assert result.code == 0, result.err
    assert json.loads((offline.folder / "exported" / "generation_config.json").read_text())["eos_token_id"] != []


def test_the_hub_is_not_asked_where_everything_is_local(hub, online):
    asked = len(hub.requests)
    result = online(*arguments("fit", "gspo"), *LEAST["fit"])
    assert result.code == 0, result.err
    assert len(hub.requests) == asked


# ---- what cannot be had, before any weights are asked for

SMALL = (*arguments("fit", "gsm8k_qwen3")[1:], *LEAST["fit"])


def check_refused(message, online, hub, *options, token=""):
    """A command ends in one line that says so, and has asked for no weights."""
    asked = len(hub.requests)
    result = online("fit", *SMALL, *options, token=token)
    error = [line for line in result.err.splitlines() if line.strip() and not re.search(NOTES, line)]
    assert result.code == 1 and len(error) == 1, result.err
    assert re.search(f"^error: .*{message}", error[0]), error[0]
    assert not hub.weights_asked(asked)


# What other lines there may be: of the cache that is taken, and progress of data.
NOTES = "only what is in the cache can be used|Using the latest cached|Found the latest cached|examples/s"
NOT_THERE = r"is no folder here and no {} on the hub, or a private one; correct it{}, or log in by 'hf auth login' or HF_TOKEN"
GATED = r"'me/gated' is gated; accept its terms at https://huggingface\.co/{}me/gated and log in by 'hf auth login' or HF_TOKEN"
NOT_ADMITTED = r"'me/gated' is gated, and this login has no access to it; accept its terms at https://huggingface\.co/{}me/gated"
REFUSED = r"the hub refuses HF_TOKEN, which is revoked, expired or mistyped; set HF_TOKEN to a new one of .*, or unset it"
MODELS = [
    ("Qwen/Qwen3-0.6", "", r"'Qwen/Qwen3-0\.6' " + NOT_THERE.format("model", "")),
    ("Qwen3-0.6B", "", r"'Qwen3-0\.6B' " + NOT_THERE.format("model", r" \(most are OWNER/NAME\)")),
    ("me/private", STRANGER, "'me/private' " + NOT_THERE.format("model", "")),
    ("me/gated", "", "the model " + GATED.format("")),
    ("me/gated", STRANGER, "the model " + NOT_ADMITTED.format("")),
    ("me/base", REVOKED, REFUSED),
    ("me/cut", "", r"'me/cut' lacks 1 of \d+ weight files, such as 'model-00002-of-\d+\.safetensors'; give a model\.revision"),
    ("me/gguf", "", r"'me/gguf' has GGUF files, of which one has to be chosen: hf download me/gguf tiny\.Q8_0\.gguf, and give"),
    ("me/packed", "", r"'me/packed' is stored quantized \(quant_method gptq\), .* give the 16-bit model"),
    ("me/encoder", "", r"'me/encoder' is a 't5' model, which is no causal language model"),
    ("me/base", "", r"the tokenizer has no chat template; set model\.chat_template or use data\.format=PlainFormat"),
    ("me/strict", "", r"refuses the prompt of openai/gsm8k .*: System role not supported; .*: system_prompt=null"),
]
OTHERS = [
    ("model.revision=v9", "", r"'Qwen/Qwen3-0\.6B' has no revision 'v9'; give model\.revision a branch, tag or commit of "),
    ("data.source.path=openai/gsm8", "", "'openai/gsm8' " + NOT_THERE.format("data set", "")),
    ("data.source.path=me/gated", STRANGER, "the data set " + NOT_ADMITTED.format("datasets/")),
    ("data.source.revision=v9", "", "'openai/gsm8k' has no revision 'v9'; give revision a branch, tag or commit of https://"),
    ("data.source.name=mian", "", "data set 'openai/gsm8k' has no configuration name='mian'; give one of main, socratic"),
    ("data.source.test_split=tset", "", "test_split='tset': data set 'openai/gsm8k' has no such split, but train, test; correct"),
    ("data.source.path=me/program data.source.name=null", "", "'me/program' is a program, .* revision=refs/convert/parquet"),
    ("data.source.path=me/empty data.source.name=null", "", "data set 'me/empty' has no data files that can be read"),
]


@pytest.mark.parametrize(("options", "token", "message"), [*((f"model.model={name}", *rest) for name, *rest in MODELS), *OTHERS])
def test_what_cannot_be_had(options, token, message, online, hub):
    check_refused(message, online, hub, *(f"--{option}" for option in options.split()), token=token)


@pytest.fixture(scope="module")
def cached(commands):
    """Where the config's own model and data are in the cache."""
    assert commands[0]("fit", *SMALL).code == 0


@pytest.fixture
def no_network(hub, cached):
    port = hub.port
    hub.stop()
    yield
    hub.start(port)


def test_without_a_network_nothing_waits_and_what_is_in_the_cache_is_used(online, hub, no_network):
    """Connections are refused; other libraries would try each file six times within half a minute."""
    begun = time.monotonic()
    lacks = "'me/other' is not, or not as a whole, in the cache .*, and the hub .* cannot be reached; check the network"
    check_refused(f"the model {lacks}", online, hub, "--model.model=me/other")
    check_refused(f"the data set {lacks}", online, hub, "--data.source.path=me/other")
    result = online("fit", *SMALL)
    assert result.code == 0 and "cannot be reached" in result.err and "only what is in the cache can be used" in result.err
    assert time.monotonic() - begun < 60


def test_a_download_is_seen(online, hub):
    """In a log by a line, at a terminal by bars too."""
    online.log()
    result = online("fit", *SMALL, "--model.model=me/seen")
    assert re.search(r"downloading me/seen, \S+ GB, into", online.log()) and "Fetching" in result.err
    again = online("fit", *SMALL, "--model.model=me/seen")
    assert "downloading" not in online.log() and "Fetching" not in again.err


def test_offline_the_cache_has_to_have_it(hub, commands, cached):
    _, offline = commands
    for options, message in (
        (["--model.model=me/other"], r"'me/other' is not, .*, and HF_HUB_OFFLINE is set; unset it"),
        (["--model.revision=v9"], r"'Qwen/Qwen3-0\.6B' at revision 'v9' is not, .*, and HF_HUB_OFFLINE is set"),
        (["--data.source.revision=v9"], r"'openai/gsm8k' at revision 'v9' is not, .*, and HF_HUB_OFFLINE is set"),
        (["--data.source.name=socratic"], r"the cache has no configuration name='socratic' of .* correct it to one of main"),
    ):
        check_refused(message, offline, hub, *options)
    assert offline("fit", *SMALL, "--data.source.revision=main").code == 0
