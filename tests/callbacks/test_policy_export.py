import pytest
import torch
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


def test_exports_of_a_running_job_do_not_change_it_and_join_the_ones_that_a_resumed_run_finds(model, sums, tmp_path):
    mine, timer = tmp_path / "mine", StepTimer()

    def run(*callbacks, **flags):
        return fit(model, sums, tmp_path, *callbacks, policy={"minibatches_per_rollout": 2}, accumulate_grad_batches=2, **flags)

    def export():
        return PolicyExport(AdapterFolder(), str(mine), every_n_steps=2)

    early = run(export(), max_steps=2)
    early.trainer.save_checkpoint(tmp_path / "last.ckpt")
    module, without = run(timer, export(), max_steps=4, ckpt=tmp_path / "last.ckpt"), run(max_steps=4)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), without.parameters(), strict=True))
    loaded = {}
    for step, trained in ((2, early), (4, module)):
        loaded[step] = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), mine / f"step={step}"))
        assert_same_logits(loaded[step], logits(trained.model))
    assert (loaded[4] - loaded[2]).abs().max() > 1e-3 and timer.totals()["checkpoint"] > 0
    before = {path: path.stat().st_mtime_ns for path in mine.rglob("*")}
    with pytest.raises(ConfigError, match=r"has an export of step 4 of another run, and this one begins after step 0"):
        run(export())
    assert exports(mine) == ["step=2", "step=4"], "once each, not once a micro-batch, nor again at the end"
    assert {path: path.stat().st_mtime_ns for path in mine.rglob("*")} == before


def test_what_cannot_be_exported_is_refused_before_training(model, sums, tmp_path):
    with pytest.raises(ConfigError, match="form=LoraFolder: the plan trains 3 modules fully"):
        fit(model, sums, tmp_path, PolicyExport(LoraFolder()))
    assert not list(tmp_path.rglob("export"))
    with pytest.raises(ConfigError, match="every_n_steps must be at least 1, got 0"):
        PolicyExport(every_n_steps=0)
    module = build_policy(model)
    module.model.requires_grad_(True)
    with pytest.raises(ConfigError, match="give HybridAdapterSetup among"):
        PolicyExport().on_train_start(build_trainer(tmp_path), module)
