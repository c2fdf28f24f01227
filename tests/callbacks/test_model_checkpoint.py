"""The last checkpoint, of runs that get no better after their first validation."""

from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from tiny_runs import build_adapter, build_data, fit

from hybrid_lightning.callbacks import ModelCheckpoint, RunSummary


def run(model, sums, root, saver, *callbacks, **flags):
    policy = {"lr_full": 0.0, "lr_lora": 0.0}  # each validation gives the same
    data = build_data(sums, validation_fraction=0.2)
    flags = {"max_steps": 5, "check_val_every_n_epoch": None, "val_check_interval": 2, "enable_checkpointing": True, **flags}
    fit(model, sums, root, RunSummary(), build_adapter(), saver, *callbacks, policy=policy, data=data, **flags)


def build_saver(folder, **settings):
    return ModelCheckpoint(folder, **{"monitor": "val/avg@2", "mode": "max", "save_last": True, "filename": "{step}", **settings})


def step_of(path):
    return torch.load(path, weights_only=False)["global_step"]


def test_a_killed_run_has_that_of_its_last_validation(model, sums, tmp_path):
    killed = LambdaCallback(on_train_batch_end=Mock(side_effect=[None, None, None, None, RuntimeError("killed")]))
    with pytest.raises(RuntimeError, match="killed"):
        run(model, sums, tmp_path, build_saver(tmp_path / "kept"), killed, max_steps=6)
    assert step_of(tmp_path / "kept" / "last.ckpt") == 4


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, ["last.ckpt", "step=2.ckpt"]),  # later validations are as good, and no better
        ({"save_top_k": 0}, ["last.ckpt"]),
        ({"monitor": None, "every_n_train_steps": 2}, ["last.ckpt", "step=4.ckpt"]),  # and there is no validation
        ({"save_last": False}, ["step=2.ckpt"]),
    ],
)
def test_the_last_and_the_best_are_kept_and_nothing_is_written_twice(model, sums, tmp_path, settings, kept):
    steps, folder, unmonitored = [], tmp_path / "kept", "monitor" in settings
    noted = LambdaCallback(on_save_checkpoint=lambda trainer, *_: steps.append(trainer.global_step))
    run(model, sums, tmp_path, build_saver(folder, **settings), noted, limit_val_batches=float(not unmonitored))
    assert sorted(path.name for path in folder.iterdir()) == kept
    found = {path.name: step_of(path) for path in folder.iterdir()}
    assert all(name == f"step={step}.ckpt" or step == 5 for name, step in found.items())
    assert all(steps.count(step) <= 1 + (f"step={step}.ckpt" in kept or unmonitored) for step in steps), steps
