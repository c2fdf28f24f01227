"""Each config that names the hub runs from its hub ids and then from the cache; missing files are reported soon, in one line."""

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pytest
import yaml
from cli_runs import run
from fork_server import forked, free_port
from huggingface_hub import constants
from long_cases import long_but
from small_hub import MEMBER, REVOKED, STRANGER, Hub, filled_hub

from hybrid_lightning.adapters import AdapterPlan
from hybrid_lightning.model import loading
from hybrid_lightning.shared.hub import hub_answers

CONFIGS = Path(__file__).parents[2] / "configs"
pytestmark = [
    pytest.mark.filterwarnings("ignore:two runs with the same seed may differ"),  # programs have a time limit
    pytest.mark.filterwarnings("ignore:nothing is learned from"),
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    hub = filled_hub(tmp_path_factory.mktemp("hub"))
    with hub.connected(tmp_path_factory.mktemp("home")):
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("folder")


@contextmanager
def offline(hub: Hub) -> Iterator[None]:
    """As HF_HUB_OFFLINE=1, which libraries read when they are imported; the hub must not be asked."""
    asked = len(hub.requests)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield
    assert len(hub.requests) == asked


# ---- what can be had

# Every lowered value, of a config that trains and of one that tests. The rest is as it stands: samples of a rollout, minibatches,
# accumulation, precision, dtype, LoRA's rank.
LOWERED = {
    "fit": {"model.sampler.max_new_tokens": 6, "model.prompts_per_rollout": 4, "trainer.max_steps": 1}
    | {"adapter.calibration_prompts": 4, "data.validation_prompts": 4},
    "test": {"model.model": "Qwen/Qwen3-8B", "model.sampler.max_new_tokens": 6, "model.eval_samples": 2},
}
# Command, config and its overlays. Each config and overlay is in at least one of the runs.
FIRST = ("fit", "gsm8k_qwen3")
RUNS = [
    ("fit", "leetcode_qwen3", "loss/dppo"),
    ("fit", "gsm8k_qwen3", "data/dapo_math", "loss/dapo", "adapter/lora"),
    ("fit", "qwen3", "data/gsm8k", "loss/dr_grpo", "adapter/dora"),
    ("fit", "gsm8k_qwen3", "data/leetcode", "loss/grpo", "adapter/full"),
    ("fit", "gsm8k_qwen3", "data/math", "loss/gspo", "adapter/lora_mlp"),
    ("fit", "gsm8k_qwen3", "data/mmlu_pro", "loss/top_entropy"),
    ("fit", "qwen3", "data/mixture", "loss/off_policy_mask"),
    ("fit", "qwen3", "loss/reinforce_plus_plus"),
    ("test", "evaluate", "evaluation/benchmarks"),
]
# Those with nearly all data sets and models that there are, beside the first: these run once more, from the cache.
AGAIN = {"data/dapo_math", "evaluate"}
SHARDED = ("fit", "qwen3", "strategy/fsdp")  # as in qwen3.yaml; on two processes
# A step is enough where validations are not looked at.
NO_VALIDATION = ("--trainer.num_sanity_val_steps=0", "--trainer.limit_val_batches=0")
UNSCORED = ("--adapter.budget.share=0", *NO_VALIDATION)


def arguments(command, *configs):
    """Of the command line: the configs and what is lowered."""
    trainer = yaml.safe_load((CONFIGS / f"{configs[0]}.yaml").read_text())["trainer"]
    lowered = dict(LOWERED[command])
    if command == "fit":
        # A validation at the end; it counts micro-batches.
        lowered["trainer.val_check_interval"] = trainer.get("accumulate_grad_batches", 1)
    given = [part for name in configs for part in ("--config", str(CONFIGS / f"{name}.yaml"))]
    return [command, *given, *(f"--{name}={value}" for name, value in lowered.items())]


def last_run(folder, config):
    return max((folder / "runs" / config).iterdir(), key=lambda path: int(path.name.removeprefix("version_")))


def check(result, folder, command, config, *overlays):
    assert result.code == 0, result.err
    report = last_run(folder, config)
    if command == "test":
        evaluation = json.loads((report / "evaluation.json").read_text())
        problems = {name: values["problems"] for name, values in evaluation["sets"].items()}
        assert problems == {"aime24": 8, "aime25": 8, "leetcode": 3, "mmlu_pro": 40}
        return
    assert json.loads((report / "summary.json").read_text())["steps"] == 1
    assert (report / "checkpoints" / "last.ckpt").is_file()
    for name in overlays:
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


@pytest.fixture(scope="module")
def first(hub, folder):
    """A complete run from the hub, and its announcements; afterwards its model and data are in the cache."""
    announced = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "rank_zero_info", announced.append)
        return run(folder, *arguments(*FIRST)), announced


def test_it_runs_from_the_hub_and_is_tested_and_exported_from_the_cache(hub, folder, first):
    result, announced = first
    check(result, folder, *FIRST)
    assert re.match(r"downloading Qwen/Qwen3-0\.6B, \S+ GB, into", announced[0]) and "Fetching" in result.err
    with offline(hub):
        root = last_run(folder, FIRST[1])
        trained = ["--config", root / "config.yaml", "--ckpt_path", root / "checkpoints" / "last.ckpt"]  # names the hub id
        for command in (["test"], ["export", "--folder", "exported"]):
            result = run(folder, command[0], *trained, *command[1:])
            assert result.code == 0, result.err
    assert json.loads((folder / "exported" / "generation_config.json").read_text())["eos_token_id"] != []


@pytest.mark.parametrize("configs", long_but([[*run] for run in RUNS], 0), ids=lambda run: "+".join(run[1:]))
def test_it_runs_from_its_hub_ids_and_then_from_the_cache(configs, hub, folder):
    adapted = any(name.startswith("adapter/") for name in configs)
    options = () if configs[0] == "test" else NO_VALIDATION if adapted else UNSCORED
    check(run(folder, *arguments(*configs), *options), folder, *configs)
    if AGAIN & set(configs):
        with offline(hub):
            check(run(folder, *arguments(*configs), *options), folder, *configs)


def test_every_config_that_names_the_hub_runs_here():
    """Each overlay runs over one of them too, except strategies: their own tests run them on any model."""
    run = {name for _, *names in [FIRST, *RUNS, SHARDED] for name in names}
    kinds = ("loss", "data", "adapter", "evaluation")
    overlays = {f"{kind}/{path.stem}" for kind in kinds for path in (CONFIGS / kind).glob("*.yaml")}
    from_hub = {path.stem for path in CONFIGS.glob("*.yaml") if "Qwen/" in path.read_text()}
    assert run == overlays | from_hub | {"evaluate", "strategy/fsdp"}


def rank(hub: Hub, home: Path, folder: Path, environment: dict[str, str]) -> None:
    """One of two processes, as torchrun starts them, with a cache in which nothing is yet."""
    os.environ.update(environment)
    with hub.connected(home):
        result = run(folder, *arguments(*SHARDED), *UNSCORED, "--trainer.devices=2", "--trainer.logger.name=sharded")
    (folder / f"rank{environment['LOCAL_RANK']}").write_text(json.dumps([result.code, result.err]))


@pytest.mark.long
def test_it_runs_sharded_over_two_processes(hub, tmp_path):
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    ranks = [forked(rank, hub, tmp_path / "home", tmp_path, {**shared, "LOCAL_RANK": str(number)}) for number in range(2)]
    for number, process in enumerate(ranks):
        process.join(120)
        code, said = json.loads((tmp_path / f"rank{number}").read_text())
        assert code == 0, said[-3000:]
    (root,) = (tmp_path / "runs" / "sharded").iterdir()
    assert json.loads((root / "summary.json").read_text())["steps"] == 1


def test_another_family_runs_once_its_terms_are_accepted(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", MEMBER)
    options = ["--model.model=google/gemma-2-2b-it", "--data.format.system_prompt=null"]
    options.append("--data.format.template=Solve this. {question}")
    check(run(folder, *arguments(*FIRST), *NO_VALIDATION, *options), folder, *FIRST)
    assert json.loads((last_run(folder, FIRST[1]) / "plan.json").read_text())["model"] == "google/gemma-2-2b-it"


def test_the_hub_is_not_asked_where_everything_is_local(hub, folder):
    asked = len(hub.requests)
    result = run(folder, "score", *arguments("fit", "gspo")[1:], "--adapter.scorer=Random", "--trainer.logger=false")
    assert result.code == 0 and len(hub.requests) == asked, result.err


# ---- missing files, before any weights are requested

SMALL = (*arguments(*FIRST), *UNSCORED)


def check_refused(message, hub, folder, *options):
    """A command ends with one line that names the cause, and has requested no weights."""
    asked = len(hub.requests)
    result = run(folder, *SMALL, *options)
    error = [line for line in result.err.splitlines() if line.strip() and not re.search(NOTES, line)]
    assert result.code == 1 and len(error) == 1, result.err
    assert re.search(f"^error: .*{message}", error[0]), error[0]
    assert not hub.weights_asked(asked)


# Other lines that may appear: about the cache in use, and progress of data.
NOTES = "using only the cache|Using the latest cached|Found the latest cached|examples/s"
NOT_THERE = r"is neither a folder here nor a public {} on the hub; correct it{}, or log in with 'hf auth login' or HF_TOKEN"
GATED = (
    r"'me/gated' is gated, .*; accept its terms at https://huggingface\.co/{}me/gated and log in with 'hf auth login' or HF_TOKEN"
)
REFUSED = r"the hub rejects the token of HF_TOKEN or .*, which is revoked, .*; get a new one from .*, or unset it"
MODELS = [
    ("Qwen3-0.6B", "", r"'Qwen3-0\.6B' " + NOT_THERE.format("model", r" \(most are OWNER/NAME\)")),
    ("me/none", STRANGER, "'me/none' " + NOT_THERE.format("model", "")),
    ("me/gated", STRANGER, "the model " + GATED.format("")),
    ("me/base", REVOKED, REFUSED),
    ("me/cut", "", r"'me/cut' is missing 1 of \d+ weight files, such as 'model-00002-of-\d+\.safetensors'; give a model\.rev"),
    ("me/gguf", "", r"'me/gguf' has GGUF files, and one has to be chosen; run hf download me/gguf tiny\.Q8_0\.gguf, and give"),
    ("me/packed", "", r"'me/packed' is stored quantized \(quant_method gptq\), .* give the original 16-bit model"),
    ("me/strict", "", r"refuses the prompt of openai/gsm8k .*: System role not supported; .*: system_prompt=null"),
]
OTHERS = [
    ("model.revision=v9", "", r"'Qwen/Qwen3-0\.6B' has no revision 'v9'; give model\.revision a branch, tag or commit of "),
    ("data.source.path=openai/gsm8", "", "'openai/gsm8' " + NOT_THERE.format("data set", "")),
    ("data.source.path=me/gated", STRANGER, "the data set " + GATED.format("datasets/")),
    ("data.source.revision=v9", "", "'openai/gsm8k' has no revision 'v9'; give revision a branch, tag or commit of https://"),
    (
        "data.source.path=me/program data.source.name=null",
        "",
        "'me/program' is a loading script, .* revision=refs/convert/parquet",
    ),
    ("data.source.path=me/empty data.source.name=null", "", "data set 'me/empty' has no readable data files"),
]


@pytest.mark.parametrize(("options", "token", "message"), [*((f"model.model={name}", *rest) for name, *rest in MODELS), *OTHERS])
def test_what_cannot_be_had(options, token, message, hub, folder, monkeypatch):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    check_refused(message, hub, folder, *(f"--{option}" for option in options.split()))


def test_without_a_network_nothing_waits_and_what_is_in_the_cache_is_used(hub, folder, first, monkeypatch):
    """Connections are refused; other libraries would try each file six times within half a minute."""
    monkeypatch.setattr(hub, "reachable", False)
    hub_answers.cache_clear()
    begun = time.monotonic()
    message = "'me/other' is missing or incomplete in the cache .*, and the hub .* cannot be reached; check the network"
    with pytest.warns(match=r"the hub \S+ cannot be reached \(.*\); using only the cache"):
        check_refused(f"the model {message}", hub, folder, "--model.model=me/other")
    check_refused(f"the data set {message}", hub, folder, "--data.source.path=me/other")
    check(run(folder, *SMALL), folder, *FIRST)
    assert time.monotonic() - begun < 60
    hub_answers.cache_clear()


def test_offline_the_cache_has_to_have_it(hub, folder, first):
    with offline(hub):
        for option, message in (
            ("model.revision=v9", r"'Qwen/Qwen3-0\.6B' at revision 'v9' is missing or .*, and HF_HUB_OFFLINE is set; unset it"),
            ("data.source.name=socratic", r"the cache has no configuration name='socratic' of .* correct it to one of main"),
        ):
            check_refused(message, hub, folder, f"--{option}")
        check(run(folder, *SMALL, "--data.source.revision=main"), folder, *FIRST)
