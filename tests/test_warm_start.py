"""The command line for given completions: every command, and a policy that reinforcement learning starts from."""

import json

import pytest
import yaml
from cli_runs import done, run, write_folder

from hybrid_lightning.adapters import AdapterPlan

SUPERVISED = """
model:
  class_path: SupervisedModule
  init_args:
    model: {folder}/model
    examples_per_step: 8
    reward: {{class_path: my_parts.StartsWithDigit}}
    sampler: {{class_path: Sampler, init_args: {{max_new_tokens: 6}}}}
    eval_samples: 2
    lr_full: 0.001
    lr_lora: 0.01
data:
  source:
    class_path: FileSource
    init_args: {{train: {folder}/sums.jsonl, validation_fraction: 0.2, test_fraction: 0.2}}
  format: {{class_path: DemonstrationFormat, init_args: {{completion: "{{answer}}"}}}}
adapter: {{rank: 2, calibration_prompts: 12}}
trainer:
  accelerator: cpu
  max_steps: 40
  check_val_every_n_epoch: null
  val_check_interval: 20
  enable_progress_bar: false
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    for folder in write_folder(tmp_path_factory.mktemp("warm")):
        (folder / "sft.yaml").write_text(SUPERVISED.format(folder=folder))
        yield folder


@pytest.fixture(scope="module")
def shown(folder):
    """A supervised run."""
    result = done(folder, "fit", "--config", "sft.yaml", "--trainer.logger.init_args.name=shown")
    return folder / "runs" / "shown" / "version_0", result.out


def summary_of(root):
    return json.loads((root / "summary.json").read_text())


def test_it_learns_and_says_so(shown):
    root, out = shown
    summary = summary_of(root)
    before, after = (summary["validation"][when] for when in ("before", "after"))
    assert summary["loss"] == "SupervisedLoss" and after["val/loss"] < before["val/loss"] - 0.5
    assert summary["greedy_after"] > summary["greedy_before"]
    assert f"{before['val/loss']:.4f} -> {after['val/loss']:.4f}" in out and "greedy accuracy" in out
    assert AdapterPlan.load(root / "plan.json").calibration["signal"] == "examples"


def test_reinforcement_learning_starts_where_it_ended(folder, shown):
    root, _ = shown
    given = ["--config", root / "config.yaml", "--ckpt_path", root / "checkpoints" / "last.ckpt"]
    done(folder, "export", *given, "--folder", "start", "--form=MergedModel", "--form.dtype=float32")
    card = (folder / "start" / "README.md").read_text()
    assert "rlvr" not in card and "examples_per_step: 8" in card
    done(folder, "fit", "--config", "t.yaml", "--model.model=start", "--trainer.logger.init_args.name=after")
    after = summary_of(folder / "runs" / "after" / "version_0")
    assert after["loss"] == "GRPOLoss" and after["model"] == "start"
    assert after["greedy_before"] == pytest.approx(summary_of(root)["greedy_after"]) and after["greedy_before"] > 0.5


def test_a_run_without_a_reward_measures_the_loss_alone(folder, shown):
    config = yaml.safe_load((folder / "sft.yaml").read_text())
    del config["model"]["init_args"]["reward"]
    (folder / "plain.yaml").write_text(yaml.safe_dump(config))
    result = done(folder, "fit", "--config", "plain.yaml", "--trainer.max_steps=2", "--trainer.val_check_interval=2")
    assert "held-out loss" in result.out and "accuracy" not in result.out
    root, _ = shown
    result = done(folder, "test", "--config", "plain.yaml", "--ckpt_path", root / "checkpoints" / "last.ckpt")
    assert "loss" in result.out and "avg@2" not in result.out
    result = run(folder, "plan", "--config", "plain.yaml")
    assert result.code == 1 and "plan knows the memory of PolicyModule, but model is a SupervisedModule" in result.last
