"""Overlays of strategy, logger and rollout engine are read by the real command line over every config, and runs with them.

No config is in the way of one and not of another: `test_configs` shows that overlays of different kinds set different things.
"""

import json
import os
import sys
from itertools import cycle

import fork_server
import pytest
import yaml
from cli_runs import parse
from test_configs import CONFIGS, ROOT, settings

from hybrid_lightning.adapters import AdapterPlan

STRATEGIES = sorted((ROOT / "configs" / "strategy").glob("*.yaml"))
ROLLOUTS = sorted((ROOT / "configs" / "rollout").glob("*.yaml"))
SEVERAL = ROOT / "configs" / "logger" / "several.yaml"
LOGGERS = {  # callbacks/test_loggers.py runs with the others
    "TensorBoardLogger": ["--trainer.logger=TensorBoardLogger", "--trainer.logger.name=mine"],
    "MLFlowLogger": ["--trainer.logger=lightning.pytorch.loggers.MLFlowLogger"],
    "several": ["--config", str(SEVERAL)],
}


def named(path):
    return yaml.safe_load(path.read_text())


def check_strategy(found, wanted):
    if isinstance(wanted, str):
        assert found == wanted
    else:
        assert found.class_path == wanted["class_path"]
        assert {name: found.init_args[name] for name in wanted.get("init_args", {})} == wanted.get("init_args", {})


def check_logger(found, name):
    if name == "several":
        for logger, wanted in zip(found, named(SEVERAL)["trainer"]["logger"], strict=True):
            check_strategy(logger, wanted)
        return
    assert found.class_path.endswith(f".{name}")
    if name == "TensorBoardLogger":
        assert found.init_args.name == "mine"
        assert found.init_args.default_hp_metric is False, "what a class keeps of the config stays"


def check_rollout(found, overlay, config):
    """The config's own arguments of the sampler are kept."""
    for part, wanted in named(overlay)["model"].items():
        assert found[part].class_path.rpartition(".")[2] == wanted["class_path"]
        given = (settings(named(config)).get(part) or {}).get("init_args", {}) | wanted.get("init_args", {})
        assert {name: found[part].init_args[name] for name in given} == given


@pytest.mark.parametrize(
    ("config", "strategy", "logger", "rollout"),
    list(zip(CONFIGS, cycle(STRATEGIES), cycle(LOGGERS), cycle(ROLLOUTS))),
    ids=lambda value: getattr(value, "stem", value),
)
def test_they_go_over_every_config(config, strategy, logger, rollout, here, monkeypatch):
    nodes = ["--trainer.devices=8", "--trainer.num_nodes=4"]
    on_examples = config.stem in ("sft", "dpo")  # which take the engine alone
    engine = ["--model.sampler=VLLMSampler"] if on_examples else ["--config", str(rollout)]
    overlays = ["--config", str(strategy), *LOGGERS[logger], *engine]
    parsed = parse(["fit", "--config", str(config), *overlays, *nodes], monkeypatch)
    check_strategy(parsed.trainer.strategy, named(strategy)["trainer"]["strategy"])
    check_logger(parsed.trainer.logger, logger)
    if on_examples:
        sampler = parsed.model.init_args.sampler
        assert sampler.class_path.endswith(".VLLMSampler") and sampler.init_args.max_new_tokens == 20
    else:
        check_rollout(parsed.model.init_args, rollout, config)
    assert str(parsed.trainer.devices) == "8" and parsed.trainer.num_nodes == 4
    assert parsed.trainer.max_steps == named(config)["trainer"]["max_steps"]


def test_each_says_what_it_is_for_and_goes_over_a_config():
    assert len(CONFIGS) >= max(len(STRATEGIES), len(LOGGERS), len(ROLLOUTS))
    of_configs = {name for path in CONFIGS for name in named(path)["trainer"]}
    assert {name for path in STRATEGIES for name in named(path)["trainer"]} == {"strategy", "devices"}
    assert "strategy" not in of_configs
    for path in ROLLOUTS:
        said = named(path)
        assert said.keys() == {"model"} and said["model"].keys() == {"sampler", "correction"}
        assert said["model"]["correction"] == {"class_path": "TokenTruncation", "init_args": {"cap": 2.0}}


def test_servers_are_named_on_the_command_line(here, monkeypatch):
    configs = [str(ROOT / "configs" / name) for name in ("gspo.yaml", "rollout/vllm_server.yaml")]
    urls = ["http://127.0.0.1:8001", "http://127.0.0.1:8002"]
    given = ["fit", *(f"--config={path}" for path in configs), f"--model.sampler.urls=[{','.join(urls)}]"]
    assert parse(given, monkeypatch).model.init_args.sampler.init_args.urls == urls


def test_lightnings_launcher_starts_a_sharded_run(here):
    """By its command, for which a process is forked."""
    small = ["--model.prompts_per_rollout=4", "--model.samples_per_prompt=4", "--adapter.calibration_prompts=8"]
    small += ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.num_sanity_val_steps=0"]
    small += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--data.validation_prompts=6"]
    given = ["--config", str(ROOT / "configs" / "gspo.yaml"), "--config", str(ROOT / "configs" / "strategy" / "fsdp2.yaml")]
    arguments = ["fit", *given, "--trainer.devices=2", *small]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    options = {"cwd": here, "env": environment, "capture_output": True, "text": True, "timeout": 150, "check": False}
    result = fork_server.run([sys.executable, "-m", "hybrid_lightning", *arguments], **options)
    assert result.returncode == 0, result.stderr[-3000:]
    (folder,) = (here / "runs" / "gspo").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 2 and 0 <= summary["accuracy_after"] <= 1 and len(summary["full_modules"]) == 3
    trainable = AdapterPlan.load(folder / "plan.json").trainable_parameters()
    assert summary["trainable_parameters"] == trainable, "of the whole model, not of one rank's part"
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"last.ckpt", "step=2.ckpt"}
