"""Every strategy overlay is read by the real command line over every config, and trains on two processes started by Lightning."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fork_server
import pytest
import yaml
from cli_runs import parse
from test_configs import CONFIGS, ROOT

from hybrid_lightning.adapters.plan import AdapterPlan

STRATEGIES = sorted((ROOT / "configs" / "strategy").glob("*.yaml"))


def pairs():
    """Every config with a strategy, and every strategy with two configs at least."""
    return [(config, STRATEGIES[number % len(STRATEGIES)]) for number, config in enumerate(CONFIGS)]


def test_pairs_stand_for_all():
    """No config says what strategies say, but for the number of devices: none is in the way of one and not of another."""
    assert len(CONFIGS) >= 2 * len(STRATEGIES)
    of_strategies = {name for path in STRATEGIES for name in yaml.safe_load(path.read_text())["trainer"]}
    of_configs = {name for path in CONFIGS for name in yaml.safe_load(path.read_text())["trainer"]}
    assert of_strategies == {"strategy", "devices"} and "strategy" not in of_configs


@pytest.mark.parametrize(("config", "strategy"), pairs(), ids=lambda path: path.stem)
def test_it_goes_over_every_config(config, strategy, here, monkeypatch):
    nodes = ["--trainer.devices=8", "--trainer.num_nodes=4"]
    parsed = parse(["fit", "--config", str(config), "--config", str(strategy), *nodes], monkeypatch)
    named = yaml.safe_load(strategy.read_text())["trainer"]["strategy"]
    found = parsed.trainer.strategy
    if isinstance(named, str):
        assert found == named
    else:
        given = named.get("init_args", {})
        assert found.class_path == named["class_path"]
        assert {name: found.init_args[name] for name in given} == given
    assert str(parsed.trainer.devices) == "8" and parsed.trainer.num_nodes == 4
    assert parsed.trainer.max_steps == yaml.safe_load(config.read_text())["trainer"]["max_steps"]


def test_lightnings_launcher_starts_a_sharded_run(tmp_path):
    small = [
        "--model.prompts_per_rollout=4",
        "--model.samples_per_prompt=4",
        "--adapter.calibration_prompts=8",
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=2",
        "--data.validation_prompts=6",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]
    overlay = str(ROOT / "configs" / "strategy" / "fsdp2.yaml")
    command = ["fit", "--config", str(ROOT / "configs" / "gspo.yaml"), "--config", overlay, "--trainer.devices=2", *small]
    result = run(command, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    (folder,) = (tmp_path / "runs" / "gspo").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 2 and 0 <= summary["accuracy_after"] <= 1 and len(summary["full_modules"]) == 3
    trainable = AdapterPlan.load(folder / "plan.json").trainable_parameters()
    assert summary["trainable_parameters"] == trainable, "of the whole model, not of one rank's part"
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"last.ckpt", "step=2.ckpt"}


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    arguments = [sys.executable, "-m", "hybrid_lightning", *command]
    # The first process is forked; the other one is what Lightning starts.
    return fork_server.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=150, check=False)
