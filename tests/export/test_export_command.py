"""`python -m hybrid_lightning export`, after a run of the command line."""

import shutil

import pytest
import torch
from cli_runs import run, write_folder
from exported import files, logits
from peft import PeftModel
from rounding import assert_same_logits
from transformers import AutoModelForCausalLM

from hybrid_lightning.policy.module import PolicyModule

TRAINING_SETTINGS = ["--trainer.precision=16-mixed", "--trainer.devices=4", "--trainer.strategy=fsdp"]  # an export needs none


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield from write_folder(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def fitted(folder):
    shares = {"hybrid": 0.1, "lora": 0}
    for name, share in shares.items():
        named = [f"--trainer.logger.init_args.name={name}", f"--adapter.budget.share={share}"]
        short = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.num_sanity_val_steps=0"]
        result = run(folder, "fit", "--config", "t.yaml", *named, *short)
        assert result.code == 0, result.err
    return folder / "runs"


def arguments(root):
    return ["--config", root / "config.yaml", "--ckpt_path", root / "checkpoints" / "last.ckpt"]


def expected(root):
    return logits(PolicyModule.load_from_checkpoint(root / "checkpoints" / "last.ckpt").model)


@pytest.mark.parametrize("settings", [[], TRAINING_SETTINGS], ids=["", "of training"])
def test_the_merged_model(folder, fitted, tmp_path, settings):
    root = fitted / "hybrid" / "version_0"
    form = ["--form=MergedModel", "--form.dtype=float32"]
    result = run(folder, "export", *arguments(root), f"--folder={tmp_path}/out", *form, *settings)
    assert result.code == 0, result.err
    assert f"Policy written to {tmp_path}/out" in result.out
    loaded = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert_same_logits(loaded, expected(root))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "after 2 optimizer steps" in card and "StartsWithDigit" in card and "sums.jsonl" in card and "val/avg@2" in card
    assert files(fitted / "hybrid") == {"version_0"}, "an export is no run"


def test_the_bases_dtype_is_the_default_and_said(folder, fitted, tmp_path):
    root = fitted / "hybrid" / "version_0"
    result = run(folder, "export", *arguments(root), f"--folder={tmp_path}/out")
    assert result.code == 0, result.err
    assert f"Policy written to {tmp_path}/out in float32\n" in result.out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float32
    assert_same_logits(logits(loaded), expected(root))


def test_the_base_is_loaded_once_and_in_no_other_place(folder, fitted, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("the module's own weights are loaded")

    monkeypatch.setattr("hybrid_lightning.policy.language.load_model", fail)
    result = run(folder, "export", *arguments(fitted / "hybrid" / "version_0"), f"--folder={tmp_path}/out")
    assert result.code == 0, result.err


@pytest.mark.parametrize(("form", "name"), [("AdapterFolder", "hybrid"), ("LoraFolder", "lora")])
def test_the_adapter(folder, fitted, tmp_path, form, name):
    root = fitted / name / "version_0"
    result = run(folder, "export", *arguments(root), f"--folder={tmp_path}/out", f"--form={form}")
    assert result.code == 0, result.err
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), tmp_path / "out")
    assert_same_logits(logits(loaded), expected(root))


def test_what_is_wrong_is_said_in_the_last_line(folder, fitted, tmp_path):
    root = fitted / "hybrid" / "version_0"
    there = tmp_path / "there"
    shutil.copytree(folder / "model", there)
    cases = [
        ([*arguments(root), "--folder", there], 1, "is there and not empty; give a new folder, or remove this one"),
        ([*arguments(root)[:2], "--folder", tmp_path / "new"], 1, "nothing was trained; give ckpt_path"),
        (
            [*arguments(root), "--form=MergedModel", "--form.dtype=int8", "--folder", tmp_path / "new"],
            1,
            "form.dtype must be one of",
        ),
        (arguments(root), 2, "folder"),
    ]
    for options, code, message in cases:
        result = run(folder, "export", *options)
        assert (result.code, result.last.startswith("error: ")) == (code, True) and message in result.last, result.last
    assert files(tmp_path) == {"there"} and files(there) == files(folder / "model")
