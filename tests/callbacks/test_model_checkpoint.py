"""The last checkpoint, of runs that get no better after their first validation."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback
from tiny_runs import build_adapter, build_data, fit

from hybrid_lightning.callbacks import ModelCheckpoint, RunSummary


class Killed(Callback):
    """Ends a run after five steps, as an exception does."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 5:
            raise RuntimeError("killed")


def run(model, sums, root, saver, *callbacks, **flags):
    policy = {"lr_full": 0.0, "lr_lora": 0.0}  # each validation gives the same
    data = build_data(sums, validation_fraction=0.2)
    flags = {"max_steps": 5, "check_val_every_n_epoch": None, "val_check_interval": 2, "enable_checkpointing": True, **flags}
    fit(model, sums, root, RunSummary(), build_adapter(), saver, *callbacks, policy=policy, data=data, **flags)


def build_saver(folder, **settings):
    return ModelCheckpoint(folder, **{"monitor": "val/avg@2", "mode": "max", "save_last": True, "filename": "{step}", **settings})


def step_of(path):
    return torch.load(path, weights_only=False)["global_step"]


def test_the_last_checkpoint_has_the_last_step_and_the_best_the_best(model, sums, tmp_path):
    saver = build_saver(tmp_path / "kept")
    run(model, sums, tmp_path, saver)
    assert step_of(saver.best_model_path) == 2, "later validations are as good, and no better"
    assert step_of(saver.last_model_path) == 5
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["last.ckpt", "step=2.ckpt"]


def test_a_killed_run_has_that_of_its_last_validation(model, sums, tmp_path):
    saver = build_saver(tmp_path / "kept")
    with pytest.raises(RuntimeError, match="killed"):
        run(model, sums, tmp_path, saver, Killed(), max_steps=6)
    assert step_of(tmp_path / "kept" / "last.ckpt") == 4


@pytest.mark.parametrize("settings", [{"save_top_k": 0}, {"monitor": None, "every_n_train_steps": 2}])
def test_nothing_is_written_twice(model, sums, tmp_path, settings):
    steps, saver = [], build_saver(tmp_path / "kept", **settings)
    noted = LambdaCallback(on_save_checkpoint=lambda trainer, *_: steps.append(trainer.global_step))
    run(model, sums, tmp_path, saver, noted)
    assert step_of(tmp_path / "kept" / "last.ckpt") == 5
    own = [step_of(path) for path in (tmp_path / "kept").glob("step=*.ckpt")]
    assert all(steps.count(step) <= 1 + (step in own or settings.get("monitor", "") is None) for step in steps), steps


def test_without_validation_the_end_is_saved_and_who_wants_no_last_checkpoint_gets_none(model, sums, tmp_path):
    run(model, sums, tmp_path, build_saver(tmp_path / "a", monitor=None, every_n_train_steps=2), limit_val_batches=0)
    assert step_of(tmp_path / "a" / "last.ckpt") == 5
    run(model, sums, tmp_path, build_saver(tmp_path / "b", save_last=False))
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["step=2.ckpt"]
