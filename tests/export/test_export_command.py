import json
import re
import shlex
import shutil

import pytest
import torch
import yaml
from cli_runs import done
from exported import logits
from rounding import assert_same_logits
from transformers import AutoModelForCausalLM

from hybrid_lightning.model import pretrained
from hybrid_lightning.training import PolicyModule

TRAINING_SETTINGS = ["--trainer.precision=16-mixed", "--trainer.devices=4", "--trainer.strategy=fsdp"]  # an export needs none


def arguments(root):
    return ["--config", root / "config.yaml", "--ckpt_path", root / "checkpoints" / "last.ckpt"]


def expected(root):
    return logits(PolicyModule.load_from_checkpoint(root / "checkpoints" / "last.ckpt").model)


def test_the_merged_model_in_the_bases_dtype(folder, run_and_number, tmp_path, monkeypatch):
    loads, load = [], pretrained.load_model
    root, _ = run_and_number
    runs = set(folder.glob("runs/*/*"))
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "load_model", lambda *given: loads.append(given) or load(*given))
        result = done(folder, "export", *arguments(root), f"--folder={tmp_path}/out", *TRAINING_SETTINGS)
    assert f"Policy written to {tmp_path}/out in float32\n" in result.out and len(loads) == 1, "not also the module's weights"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float32
    assert_same_logits(logits(loaded), expected(root))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "after 4 optimizer steps" in card and "StartsWithDigit" in card and "sums.jsonl" in card and "val/avg@2" in card
    assert set(folder.glob("runs/*/*")) == runs, "an export is not a run"


def measured(folder, result, command="test"):
    """The measurements of the next command that a screen shows."""
    line = re.search(r"^Next: +\S+ -m hybrid_lightning (.+)$", result.out, re.MULTILINE)[1]
    again = done(folder, *shlex.split(line))
    assert shlex.split(line)[0] == command
    assert "Measured by reward StartsWithDigit, format PlainFormat, dtype float32" in again.out
    report = json.loads((folder / re.search(r"^Written to (.+/evaluation\.json)", again.out, re.MULTILINE)[1]).read_text())
    return report["overall"]


@pytest.fixture(scope="module")
def run_and_number(folder):
    """A run by a given plan that changed its weights much, and the measurements of its own next command."""
    done(folder, "score", "--config", "t.yaml", "--trainer.logger.init_args.name=plan", "--adapter.scorer=Random")
    plan = f"--adapter.plan={folder}/runs/plan/version_0/plan.json"
    result = done(folder, "fit", "--config", "t.yaml", "--trainer.logger.init_args.name=my run", "--model.lr_lora=0.05", plan)
    return folder / "runs" / "my run" / "version_0", measured(folder, result)


@pytest.mark.parametrize("form", [["MergedModel", "--form.dtype=float32"], ["AdapterFolder"]], ids=lambda form: form[0])
def test_the_printed_command_gives_the_runs_own_numbers(folder, run_and_number, tmp_path, form):
    """All numbers are exactly the same: a policy that samples in float32 on a CPU adds LoRA to its weights as an export does.

    A sum that is rounded differently is off by 1e-6. To matter, that would have to decide between two tokens in one of 150 draws.
    """
    root, numbers = run_and_number
    config = yaml.safe_load((root / "config.yaml").read_text())
    config["model"]["init_args"]["revision"] = "main"  # for a hub model; the exported folder is not one
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    result = done(folder, "export", *arguments(root), "--model.revision=null", f"--folder={tmp_path}/what came", "--form", *form)
    assert measured(folder, result) == numbers and 0 < numbers["avg@2"] < 1 and numbers["problems"] == 8


def test_of_a_run_that_was_stopped_it_is_the_validation(folder, run_and_number, tmp_path):
    root = shutil.copytree(run_and_number[0], tmp_path / "stopped")
    own = json.loads((root / "summary.json").read_text())["accuracy_after"]
    (root / "summary.json").unlink()
    form = ["--form=MergedModel", "--form.dtype=float32", "--model.revision=null"]
    result = done(folder, "export", *arguments(root), f"--folder={tmp_path}/out", *form)
    assert measured(folder, result, "validate")["avg@2"] == own


def test_where_the_runs_config_is_not_there_no_command_is_printed(folder, run_and_number, tmp_path):
    shutil.copy(run_and_number[0] / "checkpoints" / "last.ckpt", tmp_path)
    result = done(folder, "export", "--config=t.yaml", f"--ckpt_path={tmp_path}/last.ckpt", f"--folder={tmp_path}/out")
    assert "Policy written" in result.out and "Next:" not in result.out
