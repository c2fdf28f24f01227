"""No two runs share a folder, whatever the loggers and however they start, and nothing is overwritten."""

import errno
import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tiny_runs import StartsWithDigit, build_adapter, build_data, build_policy, build_trainer, fit

from hybrid_lightning.callbacks import (
    EvaluationReport,
    ModelCheckpoint,
    PolicyExport,
    PredictionWriter,
    RolloutSamples,
    RunFolder,
    RunSummary,
)
from hybrid_lightning.callbacks.run_folder import check_run_folder, find_callback, run_folder
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.export import AdapterFolder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def process(root, *loggers, rank=0, answers=None):
    """As much of a Trainer as a claim needs. The other ranks get rank 0's `answers`."""
    told = []

    def broadcast(value):
        told.append(value)
        return value if answers is None else answers[len(told) - 1]

    savers, strategy = [ModelCheckpoint(), ModelCheckpoint("mine")], SimpleNamespace(broadcast=broadcast)
    trainer = SimpleNamespace(fast_dev_run=False, callbacks=[], checkpoint_callbacks=savers, strategy=strategy, told=told)
    trainer.is_global_zero, trainer.loggers, trainer.default_root_dir = rank == 0, list(loggers), str(root)
    return trainer


def test_ten_runs_that_start_at_once_get_ten_folders(tmp_path, monkeypatch):
    (tmp_path / "name" / "version_4").mkdir(parents=True)
    start, begun, mkdir = threading.Barrier(10), set(), Path.mkdir

    def together(path, *args, **flags):
        """All have looked at the existing folders before the first makes one."""
        if path.name == "version_5" and threading.get_ident() not in begun:
            begun.add(threading.get_ident())
            start.wait(timeout=60)
        mkdir(path, *args, **flags)

    def claim(_):
        trainer = process(tmp_path / "name", TensorBoardLogger(tmp_path, "name"))
        return run_folder(trainer), Path(trainer.loggers[0].log_dir)

    monkeypatch.setattr(Path, "mkdir", together)
    with ThreadPoolExecutor(10) as threads:
        found = list(threads.map(claim, range(10)))
    assert sorted(path.name for path, _ in found) == sorted(f"version_{number}" for number in range(5, 15))
    assert all(log_dir == path for path, log_dir in found)


def test_every_process_knows_the_folder_and_asks_once(tmp_path):
    first = process(tmp_path, TensorBoardLogger(tmp_path, "a"))
    folder = run_folder(first)
    second = process(tmp_path / "elsewhere", TensorBoardLogger(tmp_path, "a"), rank=1, answers=first.told)
    assert folder == run_folder(second) == tmp_path / "a" / "version_0" and second.loggers[0].version == 0
    for trainer in (first, second):
        own, given = (callback.dirpath for callback in trainer.checkpoint_callbacks)
        assert own == str(folder / "checkpoints") and given == str(Path("mine").absolute())
        assert run_folder(trainer) == folder and len(trainer.told) == 1, "after the claim nobody waits for another"
    assert names(tmp_path) == ["a"]


def test_every_process_ends_where_the_folder_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    first = process(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"the run folder .*file.*; give .* --trainer\.default_root_dir="):
        run_folder(first)
    with pytest.raises(ConfigError, match="the run folder cannot be made"):
        run_folder(process(tmp_path, rank=1, answers=first.told))


def test_where_it_is_without_a_logger_and_with_a_version_that_may_be_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_folder(process(tmp_path / "root")) == tmp_path / "root" / "version_0"
    assert run_folder(process(tmp_path)) == Path("runs", "default", "version_0"), "the default root is the working directory"
    for version, found in {3: ["version_3", "version_4"], "mine": ["mine", "mine-v1", "mine-v2"]}.items():
        for name in found:
            logger = CSVLogger(tmp_path, "name", version=version)
            assert run_folder(process(tmp_path, logger)) == tmp_path / "name" / name == Path(logger.log_dir)


def test_a_folder_is_given_up_where_another_logger_cannot_have_its_own(tmp_path, recwarn):
    (tmp_path / "b" / "y" / "version_0").mkdir(parents=True)
    loggers = [TensorBoardLogger(tmp_path / "a", "x"), CSVLogger(tmp_path / "b", "y"), CSVLogger(tmp_path / "a", "x")]
    loggers.append(TensorBoardLogger(tmp_path / "b", "y"))
    assert run_folder(process(tmp_path, *loggers)) == tmp_path / "a" / "x" / "version_1"
    assert {logger.version for logger in loggers} == {1} and names(tmp_path / "b" / "y") == ["version_0", "version_1"]
    assert not [warning for warning in recwarn if "not empty" in str(warning.message)]
    (tmp_path / "b" / "mine").mkdir(parents=True)
    loggers = [CSVLogger(tmp_path / "a", "", version="mine"), CSVLogger(tmp_path / "b", "")]
    assert run_folder(process(tmp_path, *loggers)) == tmp_path / "a" / "mine-v1"
    assert names(tmp_path / "a") == ["mine-v1", "x"] and names(tmp_path / "b") == ["mine", "mine-v1", "y"]


def writers(export=None):
    """All callbacks that write."""
    writing = [RunSummary(), EvaluationReport(), build_adapter(), RolloutSamples(1), PolicyExport(AdapterFolder(), export)]
    return [*writing, PredictionWriter(), ModelCheckpoint(save_last=True)]


def test_a_second_run_of_lightnings_own_trainer_changes_nothing_of_the_first(model, sums, tmp_path):
    """Of our own Trainer and of other loggers: `test_loggers`."""
    policy, data = {"reward": StartsWithDigit()}, build_data(sums, validation_fraction=0.2)
    flags = {"max_steps": 1, "enable_checkpointing": True, "num_sanity_val_steps": -1, "kind": LightningTrainer}
    before = {}
    for number in range(2):
        logger = TensorBoardLogger(tmp_path, "x")
        module = fit(model, sums, tmp_path / "x", *writers(), policy=policy, data=data, logger=logger, **flags)
        folder = run_folder(module.trainer)
        assert folder == tmp_path / "x" / f"version_{number}"
        assert {"plan.json", "summary.json", "evaluation.json", "checkpoints", "export"} <= set(names(folder))
        assert names(folder / "checkpoints") and any("tfevents" in name for name in names(folder))
        earlier, before = before, content(tmp_path)
        assert earlier.items() <= before.items()
    assert names(tmp_path) == ["x"] and names(tmp_path / "x") == ["version_0", "version_1"]


def test_of_two_lightning_trainers_with_loggers_in_one_folder_one_gets_it_if_it_is_a_log_alone(tmp_path):
    """Lightning lets loggers choose and make their folder before any callback is asked, each by looking for the last one."""
    loggers = [TensorBoardLogger(tmp_path, "x", version=0) for _ in range(2)]
    for logger in (*loggers, mine := TensorBoardLogger(tmp_path, "x", version="mine")):
        _ = logger.experiment
    folders = [run_folder(process(tmp_path, logger)) for logger in loggers]
    assert folders == [tmp_path / "x" / "version_0", tmp_path / "x" / "version_1"]
    (tmp_path / "x" / "mine" / "plan.json").write_text("of another run")
    assert run_folder(process(tmp_path, mine)) == tmp_path / "x" / "mine-v1"


def test_a_place_that_cannot_be_written_to_is_found_before_the_claim(tmp_path, monkeypatch):
    for loggers, option in (([CSVLogger(tmp_path / "runs", "x")], "logger.save_dir"), ([], "default_root_dir")):
        trainer = process(tmp_path / "runs", *loggers)
        check_run_folder(trainer)
        assert not names(tmp_path), "the check leaves no file and no folder"
        message = rf"{os.strerror(errno.ENOSPC)}.*; give .* by --trainer\.{option}=FOLDER$"
        for module, name in ((Path, "mkdir"), (tempfile, "TemporaryFile")):
            with monkeypatch.context() as patch, pytest.raises(ConfigError, match=message):
                patch.setattr(module, name, Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))))
                check_run_folder(trainer)
        assert not names(tmp_path)
    (tmp_path / "file").touch()
    trainer.checkpoint_callbacks = [ModelCheckpoint(tmp_path / "file" / "x")]
    with pytest.raises(ConfigError, match=r"checkpoints' folder .*; give --checkpoint\.dirpath=FOLDER another one, or null"):
        check_run_folder(trainer)
    check_run_folder(process(tmp_path / "file", rank=1))
    assert names(tmp_path) == ["file"], "the first process alone looks"


class WritesAtTheEnd(CSVLogger):
    """Like TensorBoard's logger: a thread writes the file and may come late."""

    def finalize(self, status):
        Path(self.log_dir, "metrics.csv").write_text("the end")


def test_a_run_that_fails_at_the_start_leaves_nothing_but_what_was_there(model, sums, tmp_path):
    (tmp_path / "x" / "version_0").mkdir(parents=True)
    loggers = [WritesAtTheEnd(tmp_path, "x"), CSVLogger(tmp_path / "new", "y")]
    with pytest.raises(ConfigError, match="cannot be split evenly"):
        fit(model, sums, tmp_path, policy={"minibatches_per_rollout": 7}, logger=loggers)
    assert list(tmp_path.rglob("*")) == [tmp_path / "x", tmp_path / "x" / "version_0"]


@pytest.mark.parametrize("name", ["checkpoints/stopped.ckpt", "mine.txt"])
def test_a_folder_with_anything_that_was_made_is_kept(tmp_path, name):
    trainer = process(tmp_path / "runs", CSVLogger(tmp_path / "runs", "x"))
    folder = run_folder(trainer)
    for path in ("config.yaml", "hparams.yaml", "plan.json", name):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).touch()
    before = content(tmp_path)
    holder = find_callback(trainer, RunFolder)
    holder.give_back()
    assert content(tmp_path) == before and (folder / name).is_file()
    (folder / name).unlink()
    if name == "mine.txt":
        holder.on_train_batch_end(trainer, None)
    holder.give_back()
    assert bool(names(tmp_path)) is (name == "mine.txt"), "nor is one in which something has been done, whatever is in it"


def test_a_trial_run_has_none_and_its_callbacks_write_nothing(model, sums, tmp_path):
    trainer = build_trainer(tmp_path, *writers(str(tmp_path / "mine")), fast_dev_run=True, enable_checkpointing=True)
    data = build_data(sums, validation_fraction=0.2, test_fraction=0.2)
    trainer.fit(policy := build_policy(model, reward=StartsWithDigit()), datamodule=data)
    trainer.test(policy, datamodule=data, verbose=False)
    trainer.predict(policy, datamodule=data, return_predictions=False)
    assert trainer.log_dir is None and run_folder(trainer) is None and not names(tmp_path)
