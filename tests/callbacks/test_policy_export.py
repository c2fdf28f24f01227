from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from peft import PeftModel
from rounding import assert_same_logits
from tiny_runs import build_policy, build_trainer, fit
from transformers import AutoModelForCausalLM

from hybrid_lightning.callbacks import PolicyExport, RunSummary, StepTimer
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.export import AdapterFolder, LoraFolder, MergedModel

IDS = torch.tensor([[4, 5, 13, 6, 16]])


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def exports(folder):
    return sorted(path.name for path in folder.iterdir())


def test_at_the_end_of_training_and_by_the_trainer_itself(model, sums, tmp_path):
    module = fit(model, sums, tmp_path, RunSummary(), PolicyExport(MergedModel("float32")))
    module.trainer.export(module, form=MergedModel("float32"), folder=str(tmp_path / "out"))
    folder = tmp_path / "version_0" / "export" / "merged"
    assert exports(folder) == ["step=2"]
    for path in (folder / "step=2", tmp_path / "out"):
        assert_same_logits(logits(AutoModelForCausalLM.from_pretrained(path)), logits(module.model))
        card = (path / "README.md").read_text()
        assert "after 2 optimizer steps" in card and sums.name in card and "DigitShare" in card


def test_from_a_running_job_which_goes_on_as_without(model, sums, tmp_path):
    export, timer = PolicyExport(AdapterFolder(), str(tmp_path / "mine"), every_n_steps=2), StepTimer()
    policy = {"minibatches_per_rollout": 2}
    module = fit(model, sums, tmp_path / "a", timer, export, policy=policy, max_steps=4, accumulate_grad_batches=2)
    without = fit(model, sums, tmp_path / "b", policy=policy, max_steps=4, accumulate_grad_batches=2)
    assert exports(tmp_path / "mine") == ["step=2", "step=4"], "once each, not once a micro-batch, nor again at the end"
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), without.parameters(), strict=True))
    loaded = {}
    for step in (2, 4):
        base = AutoModelForCausalLM.from_pretrained(model)
        loaded[step] = logits(PeftModel.from_pretrained(base, tmp_path / "mine" / f"step={step}"))
    assert_same_logits(loaded[4], logits(module.model))
    early = fit(model, sums, tmp_path / "c", policy=policy, max_steps=2, accumulate_grad_batches=2)
    assert_same_logits(loaded[2], logits(early.model))
    assert (loaded[4] - loaded[2]).abs().max() > 1e-3
    assert timer.totals()["checkpoint"] > 0


def test_a_resumed_run_exports_beside_what_is_there_and_another_run_does_not(model, sums, tmp_path):
    def export(**options):
        return fit(model, sums, tmp_path, PolicyExport(AdapterFolder(), str(tmp_path / "mine")), **options)

    export(max_steps=1).trainer.save_checkpoint(tmp_path / "last.ckpt")
    export(ckpt=tmp_path / "last.ckpt", max_steps=2)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "mine").rglob("*")}
    with pytest.raises(ConfigError, match=r"has an export of step 2 of another run, and this one begins after step 0"):
        export()
    assert exports(tmp_path / "mine") == ["step=1", "step=2"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "mine").rglob("*")} == before


def test_what_cannot_be_exported_is_refused_before_training(model, sums, tmp_path):
    with pytest.raises(ConfigError, match="form=LoraFolder: the plan trains 3 modules fully"):
        fit(model, sums, tmp_path, PolicyExport(LoraFolder()))
    assert not list(tmp_path.rglob("export"))
    with pytest.raises(ConfigError, match="every_n_steps must be at least 1, got 0"):
        PolicyExport(every_n_steps=0)
    trainer = SimpleNamespace(strategy=FSDPStrategy(accelerator="cuda"))
    with pytest.raises(ConfigError, match=r"cannot put together the shards of FSDP1 .* the export command on a checkpoint"):
        PolicyExport().on_train_start(trainer, fit(model, sums, tmp_path, max_steps=0))
    module = build_policy(model)
    module.model.requires_grad_(True)
    with pytest.raises(ConfigError, match="give HybridAdapterSetup among"):
        PolicyExport().on_train_start(build_trainer(tmp_path), module)
