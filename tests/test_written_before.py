"""What commit a100f97 wrote loads and goes on: checkpoints of every kind, plans and configs, whatever has moved since.

The files in `written_by_a100f97/` are of its runs of three optimizer steps on a tiny Llama, with two processes for `sharded`.
"""

import json
import shutil
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from cli_runs import run

from hybrid_lightning.adapters.plan import AdapterPlan
from hybrid_lightning.advantages import LeaveOneOutAdvantage
from hybrid_lightning.configurable import public_path, with_public_paths
from hybrid_lightning.policy.examples import PreferenceModule, SupervisedModule
from hybrid_lightning.policy.module import PolicyModule
from hybrid_lightning.sharding.sharded_folder import read_weights

WRITTEN = Path(__file__).parent / "written_by_a100f97"
CLASSES = {"policy": PolicyModule, "sharded": PolicyModule, "sft": SupervisedModule, "dpo": PreferenceModule, "nf4": PolicyModule}
ALONE = ("--trainer.devices=1", "--trainer.strategy=auto")

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
kinds = pytest.mark.parametrize("kind", [pytest.param(k, marks=needs_bitsandbytes if k == "nf4" else ()) for k in CLASSES])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    shutil.copytree(WRITTEN, tmp_path / "written")
    monkeypatch.chdir(tmp_path / "written")
    return tmp_path / "written"


def content(path: Path):
    return read_weights(path) if path.is_dir() else torch.load(path, weights_only=False)


@kinds
def test_a_run_goes_on(folder, kind):
    before = content(folder / kind / "last.ckpt")
    steps = before["global_step"] + 2
    checkpoint = ("--config", f"{kind}/config.yaml", "--ckpt_path", f"{kind}/last.ckpt")
    result = run(folder, "fit", *checkpoint, f"--trainer.max_steps={steps}", "--trainer.logger.name=on", *ALONE)
    assert result.code == 0, result.err
    after = content(folder / "runs/on/version_0/checkpoints/last.ckpt")
    assert after["global_step"] == steps
    assert after["hybrid_lightning"]["plan"] == before["hybrid_lightning"]["plan"]
    assert after["state_dict"].keys() == before["state_dict"].keys()
    moved = [name for name, weight in after["state_dict"].items() if not torch.equal(weight, before["state_dict"][name])]
    assert len(moved) > len(after["state_dict"]) / 2, "it was trained"
    summary = json.loads((folder / "runs/on/version_0/summary.json").read_text())
    assert summary["changes"] == [], "nothing is taken for a change that is only another name"


@kinds
def test_a_checkpoint_rebuilds_its_module(folder, kind):
    module = CLASSES[kind].load_from_checkpoint(f"{kind}/last.ckpt", map_location="cpu")
    own = module.state_dict()
    saved = content(folder / kind / "last.ckpt")
    assert saved["state_dict"] and all(torch.equal(own[name], weight) for name, weight in saved["state_dict"].items())
    assert module.plan == AdapterPlan.load(f"{kind}/plan.json")


@pytest.mark.parametrize("command", [("test",), ("predict", "--predictions.path=predictions.jsonl")])
def test_a_checkpoint_is_evaluated(folder, command):
    result = run(folder, *command, "--config", "policy/config.yaml", "--ckpt_path", "policy/last.ckpt")
    assert result.code == 0, result.err


@kinds
def test_a_checkpoint_is_exported(folder, kind):
    checkpoint = ("--config", f"{kind}/config.yaml", "--ckpt_path", f"{kind}/last.ckpt")
    result = run(folder, "export", *checkpoint, "--folder", "exported")
    assert result.code == 0, result.err
    assert (folder / "exported" / "model.safetensors").is_file()


def test_a_plan_is_used_again_and_may_have_been_edited(folder):
    plan = AdapterPlan.load("policy/plan.json")
    changed = plan.lora_modules[0]
    lines = [line for line in Path("policy/plan.json").read_text().splitlines() if '"digest"' not in line]  # as its error says
    edited = [line.replace('"mode": "lora"', '"mode": "full"') if f'"{changed}"' in line else line for line in lines]
    Path("edited.json").write_text("\n".join(edited))
    for path, full in (("policy/plan.json", set(plan.full_modules)), ("edited.json", {*plan.full_modules, changed})):
        result = run(folder, "fit", "--config", "policy/config.yaml", f"--adapter.plan={path}", "--trainer.logger.name=again")
        assert result.code == 0, result.err
        newest = sorted((folder / "runs/again").iterdir())[-1]
        assert set(AdapterPlan.load(newest / "plan.json").full_modules) == full


def test_classes_that_have_moved_since_are_found(folder):
    """As a100f97 named them where a policy was made in Python."""
    old = "hybrid_lightning.advantages.leave_one_out.LeaveOneOutAdvantage"
    checkpoint = content(folder / "policy" / "last.ckpt")
    checkpoint["hyper_parameters"]["advantage"]["class_path"] = old
    torch.save(checkpoint, "policy/last.ckpt")
    module = PolicyModule.load_from_checkpoint("policy/last.ckpt", map_location="cpu")
    assert type(module.advantage) is LeaveOneOutAdvantage
    config = Path("policy/config.yaml").read_text().replace("hybrid_lightning.advantages.LeaveOneOutAdvantage", old)
    moved = "hybrid_lightning.adapters.scorers.tail.TailFraction"
    Path("policy/config.yaml").write_text(config.replace("hybrid_lightning.adapters.scorers.TailFraction", moved))
    steps = f"--trainer.max_steps={checkpoint['global_step'] + 2}"
    result = run(folder, "fit", "--config", "policy/config.yaml", "--ckpt_path", "policy/last.ckpt", steps)
    assert result.code == 0, result.err
    summary = json.loads((folder / "runs/policy/version_0/summary.json").read_text())
    assert [change for change in summary["changes"] if "max_steps" not in str(change)] == []
    saved = (folder / "runs/policy/version_0/config.yaml").read_text()
    assert old not in saved and moved not in saved and "hybrid_lightning.adapters.TailFraction" in saved


@pytest.mark.parametrize("path", (WRITTEN / "classes.txt").read_text().split())
def test_each_class_that_a_config_could_name_is_found(path):
    """All classes of a100f97 that were no base of others, named by file as it did."""
    room, _, name = with_public_paths(path).rpartition(".")
    assert isinstance(getattr(import_module(room), name), type)
    kind = getattr(import_module(room), name)
    assert public_path(kind) == with_public_paths(path), "and it is written by the same name"
