"""Every way to choose a logger is read by the real command line over every config, and all loggers together log a run."""

import json
import sys

import pytest
import yaml
from cli_runs import command, parse
from test_configs import CONFIGS, ROOT

OVERLAY = ROOT / "configs" / "logger" / "several.yaml"
CHOICES = {
    "CSVLogger": ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=elsewhere"],
    "WandbLogger": ["--trainer.logger=WandbLogger", "--trainer.logger.offline=true"],
    "MLFlowLogger": ["--trainer.logger=MLFlowLogger", "--trainer.logger.tracking_uri=sqlite:///runs/mlflow.db"],
    "lightning.pytorch.loggers.MLFlowLogger": ["--trainer.logger=lightning.pytorch.loggers.MLFlowLogger"],
    "TensorBoardLogger": ["--trainer.logger=TensorBoardLogger", "--trainer.logger.name=mine"],
}


@pytest.mark.parametrize(("config", "name"), list(zip(CONFIGS, CHOICES, strict=False)), ids=str)  # loggers are named alike in all
def test_one_is_chosen_over_a_config(config, name, here, monkeypatch):
    found = parse(["fit", "--config", str(config), *CHOICES[name]], monkeypatch).trainer.logger
    assert found.class_path.endswith(f".{name.rpartition('.')[2]}")
    for option in CHOICES[name][1:]:
        key, _, value = option.removeprefix("--trainer.logger.").partition("=")
        assert str(found.init_args[key]).lower() == value.lower()
    assert name != "TensorBoardLogger" or found.init_args.default_hp_metric is False, "what a class keeps of the config stays"


@pytest.mark.parametrize("config", CONFIGS[len(CHOICES) :], ids=lambda path: path.stem)
def test_none_or_several_are_chosen_over_a_config(config, here, monkeypatch):
    assert parse(["fit", "--config", str(config), "--trainer.logger=false"], monkeypatch).trainer.logger is False
    found = parse(["fit", "--config", str(config), "--config", str(OVERLAY)], monkeypatch).trainer.logger
    named = yaml.safe_load(OVERLAY.read_text())["trainer"]["logger"]
    assert [logger.class_path for logger in found] == [logger["class_path"] for logger in named]
    for logger, wanted in zip(found, named, strict=True):
        assert {key: logger.init_args[key] for key in wanted["init_args"]} == wanted["init_args"]


def test_all_together_log_a_run(here, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs wandb and mlflow: pip install -e '.[wandb,mlflow]'")
    pytest.importorskip("mlflow", reason="needs wandb and mlflow: pip install -e '.[wandb,mlflow]'")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # what MLflow sets it to is undone
    small = ["--trainer.max_steps=1", "--trainer.num_sanity_val_steps=0", "--trainer.limit_val_batches=0"]
    small += ["--model.prompts_per_rollout=4", "--model.samples_per_prompt=4", "--adapter.calibration_prompts=4"]
    small += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--checkpoint.monitor=null"]
    try:
        command(["fit", "--config", str(ROOT / "configs" / "gspo.yaml"), "--config", str(OVERLAY), *small], monkeypatch)
    finally:
        wandb.finish()
        wandb.teardown()
    (folder,) = (here / "runs" / "several").iterdir()
    names = {path.name for path in folder.iterdir()}
    assert names >= {"metrics.csv", "samples.csv", "plan.csv", "config.yaml", "plan.json", "summary.json", "checkpoints"}
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert json.loads((folder / "summary.json").read_text())["steps"] == 1
    assert {path.name for path in (here / "runs").iterdir() if path.name[0] != "."} == {
        "several",
        "wandb",
        "mlflow.db",
        "mlartifacts",
    }
    (artifacts,) = here.glob("runs/mlartifacts/*/artifacts")
    assert {path.name for path in artifacts.iterdir()} == {"config.yaml", "plan", "plan.json", "samples.json"}
    assert len(list(here.glob("runs/wandb/offline-run-*/files/media/table/samples_*.json"))) == 1
    assert sys.modules["mlflow"] and {path.name for path in here.iterdir()} == {"runs"}, "nothing lies beside the runs"
