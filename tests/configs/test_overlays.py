"""Overlays are read by the real command line over a config that says something else, and train or evaluate with it.

No config is in the way of one and not of another: `test_configs` shows that overlays of different kinds set different things. How
runs go under each strategy is in `tests/sharding`, and with the losses and adapters that do not train here in `tests/hub`.
"""

import json
from itertools import cycle
from typing import Any

import pytest
import yaml
from cli_runs import command, done, parse
from test_configs import CONFIGS, ROOT, small

from hybrid_lightning import data

FOLDERS = ("strategy", "rollout", "loss", "device", "quantization", "logger")
OVERLAYS = [path for folder in FOLDERS for path in sorted((ROOT / "configs" / folder).glob("*.yaml"))]
WITH_ROLLOUTS = [path for path in CONFIGS if path.stem not in ("sft", "dpo")]


def named(path):
    return yaml.safe_load(path.read_text())


def includes(found: Any, wanted: Any) -> bool:
    """Whether a parsed value has all that a YAML says; a class may be named by its short name."""
    if isinstance(wanted, dict):
        if "class_path" not in wanted and "init_args" in found:
            found = found["init_args"]
        return all(includes(found[name], value) for name, value in wanted.items())
    if isinstance(wanted, list):
        return all(includes(*pair) for pair in zip(found, wanted, strict=True))
    return found == wanted or str(found).endswith(f".{wanted}")


@pytest.mark.parametrize(
    ("overlay", "config"), list(zip(OVERLAYS, cycle(WITH_ROLLOUTS))), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_an_overlay_goes_over_a_config_and_keeps_the_rest(overlay, config, here, monkeypatch):
    nodes = ["--trainer.devices=8", "--trainer.num_nodes=4"]
    parsed = parse(["fit", "--config", str(config), "--config", str(overlay), *nodes], monkeypatch)
    wanted = {"trainer": {}, **named(overlay)}
    wanted["trainer"].pop("devices", None)
    assert includes(parsed, wanted) and (str(parsed.trainer.devices), parsed.trainer.num_nodes) == ("8", 4)
    assert parsed.trainer.max_steps == named(config)["trainer"]["max_steps"]
    own = named(config)["model"].get("sampler", {}).get("init_args", {})
    if overlay.parent.name == "rollout":
        assert includes(parsed.model.init_args.sampler.init_args, own), "what was said of the sampler, whose class is another"


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_logger_and_engine_are_named_over_given_completions(name, here, monkeypatch):
    options = ["--model.sampler=VLLMSampler", "--trainer.logger=TensorBoardLogger", "--trainer.logger.name=mine"]
    parsed = parse(["fit", "--config", str(ROOT / "configs" / f"{name}.yaml"), *options], monkeypatch)
    sampler, logger = parsed.model.init_args.sampler, parsed.trainer.logger
    assert sampler.class_path.endswith(".VLLMSampler") and sampler.init_args.max_new_tokens == 20
    assert logger.class_path.endswith(".TensorBoardLogger") and logger.init_args.name == "mine"
    assert logger.init_args.default_hp_metric is False, "what a class keeps of the config stays"


def test_a_kind_of_overlay_sets_one_thing_which_no_config_does():
    of_configs = {name for path in CONFIGS for name in named(path)["trainer"]}
    strategies = [named(path)["trainer"] for path in OVERLAYS if path.parent.name == "strategy"]
    assert {name for trainer in strategies for name in trainer} == {"strategy", "devices"} and "strategy" not in of_configs
    for path in (path for path in OVERLAYS if path.parent.name == "rollout"):
        assert named(path).keys() == {"model"} and named(path)["model"].keys() == {"sampler", "correction"}
        assert named(path)["model"]["correction"] == {"class_path": "TokenTruncation", "init_args": {"cap": 2.0}}


def test_servers_are_named_on_the_command_line(here, monkeypatch):
    configs = [str(ROOT / "configs" / name) for name in ("gspo.yaml", "rollout/vllm_server.yaml")]
    urls = ["http://127.0.0.1:8001", "http://127.0.0.1:8002"]
    given = ["fit", *(f"--config={path}" for path in configs), f"--model.sampler.urls=[{','.join(urls)}]"]
    assert parse(given, monkeypatch).model.init_args.sampler.init_args.urls == urls


# ---- losses, with a second reward and a bonus for entropy

REWARD = """
model:
  reward:
    class_path: WeightedSum
    init_args:
      rewards:
        - {class_path: my_parts.StartsWithDigit}
        - {class_path: OverlongPenalty, init_args: {max_tokens: 6, buffer_tokens: 3}}
      weights: [1.0, 0.5]
"""
SHORT = ["--trainer.max_steps=2", "--trainer.limit_val_batches=0", "--adapter.calibration_prompts=4"]


@pytest.mark.filterwarnings("ignore:nothing is learned from .* of a rollout's groups")  # two steps of a policy that hardly earns
def test_a_loss_trains_with_several_rewards_and_a_bonus_for_entropy(folder):
    (folder / "reward.yaml").write_text(REWARD)
    configs = ["t.yaml", ROOT / "configs" / "loss" / "top_entropy.yaml", "reward.yaml"]
    options = ["--model.sampler.max_new_tokens=4", "--model.loss.entropy_coef=0.01", "--model.advantage=PerRewardAdvantage"]
    done(folder, "fit", *(f"--config={path}" for path in configs), *options, *SHORT)
    root = folder / "runs" / "default" / "version_0"
    assert json.loads((root / "summary.json").read_text())["steps"] == 2
    used = named(root / "config.yaml")["model"]["init_args"]
    assert used["loss"]["init_args"]["entropy_coef"] == 0.01 and used["advantage"]["class_path"].endswith(".PerRewardAdvantage")


# ---- environments, with their packages

PACKAGES = {"gem": "gem", "textarena": "textarena", "textworld": "textworld", "reasoning_gym": "reasoning_gym"}
CHAT = ROOT / "configs" / "qwen3.yaml"
LORA = ROOT / "configs" / "adapter" / "lora.yaml"  # a random policy earns nothing by which modules could be scored


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "environment").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_environment_trains(path, tiny, here, monkeypatch):
    package = PACKAGES[path.stem]
    pytest.importorskip(package, reason=f"needs {package}: pip install 'hybrid-lightning[environments]'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    count = {"reasoning_gym": "size"}.get(path.stem, "count")
    sizes = {count: 4, f"validation_{count}": 2, f"test_{count}": 0}
    options = [f"--model.model={tiny}", "--model.dtype=float32", "--trainer.precision=32-true", "--model.eval_samples=1"]
    options += [f"--data.source.{name}={value}" for name, value in sizes.items()]
    options += ["--model.episodes.max_turns=2", "--model.episodes.max_tokens=1500", "--checkpoint.monitor=val/avg@1"]
    command(["fit", *(f"--config={config}" for config in (CHAT, path, LORA)), *small(named(CHAT)), *options], monkeypatch)
    (folder,) = (here / "runs" / "qwen3").iterdir()
    assert json.loads((folder / "summary.json").read_text())["steps"] == 2


# ---- evaluation, which takes a model and rows, and nothing else

EVALUATE = ["--config", str(ROOT / "configs" / "evaluate.yaml")]
FEW = ["--model.sampler.max_new_tokens=5", "--model.eval_samples=2", "--trainer.accelerator=cpu", "--trainer.devices=1"]
SETS = """
data:
  source:
    class_path: Mixture
    init_args:
      sources:
        quiz: {class_path: FileSource, init_args: {test: rows.jsonl}}
        riddles: {class_path: FileSource, init_args: {test: rows.jsonl, max_rows: 2}}
"""


def test_a_model_and_rows_are_enough_and_several_named_sets_go_over_it(tiny, here, monkeypatch, capsys):
    (here / "rows.jsonl").write_text("".join(f'{{"question": "{n} + 1?", "answer": {n + 1}}}\n' for n in range(3)))
    (here / "sets.yaml").write_text(SETS)
    given = ["test", *EVALUATE, f"--model.model={tiny}", "--trainer.enable_progress_bar=false", *FEW]
    command([*given, "--data.source.test=rows.jsonl"], monkeypatch)
    report = json.loads((here / "runs" / "evaluate" / "version_0" / "evaluation.json").read_text())
    assert report["model"] == str(tiny) and report["overall"]["problems"] == 3 and report["sets"] == {}
    assert {"avg@2", "pass@2", "maj@2", "greedy_accuracy/ci_high"} < report["overall"].keys()
    assert "adapter plan" not in capsys.readouterr().out.lower() and not list(here.rglob("plan.json")), "nothing is adapted"
    command([*given, "--config", "sets.yaml"], monkeypatch)
    report = json.loads((here / "runs" / "evaluate" / "version_1" / "evaluation.json").read_text())
    assert {name: values["problems"] for name, values in report["sets"].items()} == {"quiz": 3, "riddles": 2}


def test_the_benchmarks_have_a_reward_and_a_format_each_and_nothing_to_train_on(here, monkeypatch):
    overlay = ["--config", str(ROOT / "configs" / "evaluation" / "benchmarks.yaml")]
    parsed = parse(["test", *EVALUATE, *overlay], monkeypatch)
    source, layout = parsed.data.init_args.source.init_args, parsed.data.init_args.format.init_args
    assert source.sources.keys() == layout.formats.keys() == parsed.model.init_args.reward.init_args.rewards.keys()
    for part in source.sources.values():
        kind = getattr(data, part.class_path.rpartition(".")[2])
        splits = {parameter for parameter, _ in kind(**part.init_args).hub_splits}
        assert splits == {"test_split"}, "nothing to train on, and nothing to validate on"
    assert parsed.model.init_args.sampler.init_args.max_new_tokens == 8192
