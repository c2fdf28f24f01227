"""The last checkpoint and the best one, of runs that get no better after their first validation."""

import math
from pathlib import Path
from types import SimpleNamespace
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


def test_a_killed_run_has_the_checkpoint_of_its_last_validation(model, sums, tmp_path):
    killed = LambdaCallback(on_train_batch_end=Mock(side_effect=[None, None, None, None, RuntimeError("killed")]))
    with pytest.raises(RuntimeError, match="killed"):
        run(model, sums, tmp_path, build_saver(tmp_path / "kept"), killed, max_steps=6)
    assert step_of(tmp_path / "kept" / "last.ckpt") == 4


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, ["last.ckpt", "step=5.ckpt"]),  # of equal ones the latest
        ({"save_top_k": 0}, ["last.ckpt"]),
        ({"monitor": None, "every_n_train_steps": 2}, ["last.ckpt", "step=4.ckpt"]),  # and no validation runs
        ({"save_last": False}, ["step=5.ckpt"]),
    ],
)
def test_the_last_and_the_best_are_kept_and_nothing_is_written_twice(model, sums, tmp_path, settings, kept):
    steps, folder, unmonitored = [], tmp_path / "kept", "monitor" in settings
    noted = LambdaCallback(on_save_checkpoint=lambda trainer, *_: steps.append(trainer.global_step))
    run(model, sums, tmp_path, build_saver(folder, **settings), noted, limit_val_batches=float(not unmonitored))
    assert sorted(path.name for path in folder.iterdir()) == kept
    found = {path.name: step_of(path) for path in folder.iterdir()}
    assert all(name == f"step={step}.ckpt" or step == 5 for name, step in found.items())
    assert all(steps.count(step) <= len(kept) for step in steps), steps


@pytest.mark.parametrize(("validations", "written"), [(1.0, [2, 4, 4, 4]), (0.0, [2, 4])])
def test_the_last_is_written_when_it_is_due_and_the_best_by_the_validation_that_follows(
    model, sums, tmp_path, validations, written
):
    steps, seen, folder = [], [], tmp_path / "kept"
    noted = LambdaCallback(
        on_save_checkpoint=lambda trainer, *_: steps.append(trainer.global_step),
        on_train_batch_start=lambda trainer, *_: seen.append((trainer.global_step, (folder / "last.ckpt").exists())),
        on_train_batch_end=Mock(side_effect=[None] * 4 + [RuntimeError("killed")]),
    )
    with pytest.raises(RuntimeError, match="killed"):
        run(
            model,
            sums,
            tmp_path,
            build_saver(folder, every_n_train_steps=2),
            noted,
            val_check_interval=4,
            limit_val_batches=validations,
        )
    assert seen[:3] == [(0, False), (1, False), (2, True)] and steps == written
    assert step_of(folder / "last.ckpt") == 4
    assert (folder / "step=4.ckpt").exists() == bool(validations)


def test_where_nothing_can_be_written_between_validations_the_run_says_so(model, sums, tmp_path, capsys):
    for last in (False, True):
        saver = build_saver(tmp_path / str(last), every_n_train_steps=2, save_last=last)
        run(model, sums, tmp_path, saver, max_steps=1, limit_val_batches=0)
        assert ("no checkpoint is written between validations" in capsys.readouterr().out) == (not last)


def feed(saver, *scores):
    """Validations with (step, accuracy, reward)."""
    for step, accuracy, reward in scores:
        metrics = {"val/avg@2": torch.tensor(accuracy), "val/reward": torch.tensor(reward)}
        strategy = {"reduce_boolean_decision": lambda value, **_: value, "remove_checkpoint": lambda path: Path(path).unlink()}
        flags = {"current_epoch": 0, "is_global_zero": True, "fast_dev_run": False, "loggers": [], "ckpt_path": None}
        trainer = SimpleNamespace(callback_metrics=metrics, global_step=step, strategy=SimpleNamespace(**strategy), **flags)
        trainer.save_checkpoint = lambda path, _: Path(path).touch()
        saver._save_topk_checkpoint(trainer, saver._monitor_candidates(trainer))


@pytest.mark.parametrize(("most", "kept", "after"), [(1, [5], [9]), (2, [3, 5], [8, 9])])
def test_of_equal_ones_the_better_paid_is_the_best_and_then_the_later_also_after_a_resume(tmp_path, most, kept, after):
    """Steps 3 and 5 are paid alike, better than 4; then a reward that is not known, one that is lower, and two that are equal."""
    first, second = (build_saver(tmp_path / name, save_top_k=most, save_last=False) for name in ("first", "second"))
    for saver in (first, second):
        Path(saver.dirpath).mkdir()
    feed(first, (2, 0.0, 0.1), (3, 0.0, 0.3), (4, 0.0, 0.2), (5, 0.0, 0.3))
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == [f"step={step}.ckpt" for step in kept]
    assert first.best_model_path.endswith("step=5.ckpt")
    second.load_state_dict(first.state_dict())
    feed(second, (6, 0.0, math.nan), (7, 0.0, 0.2))
    assert list((tmp_path / "second").iterdir()) == [] and second.best_model_path == first.best_model_path
    feed(second, (8, 0.0, 0.3), (9, 0.0, 0.3))
    assert sorted(path.name for path in (tmp_path / "second").iterdir()) == [f"step={step}.ckpt" for step in after]
    assert len(list((tmp_path / "first").iterdir())) == most, "a resumed run leaves the folder of the other alone"
