"""A run with every measuring and reporting callback, and a second run that continues it."""

import contextlib
import io
import json
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tiny_runs import StartsWithDigit, build_adapter, build_data, fit

from hybrid_lightning.callbacks import Diagnosis, GracefulStop, RolloutSamples, RunReport, RunSummary, StepTimer


@pytest.fixture(scope="session")
def measured(model, sums):
    """Makes a run that is validated before, after every fourth step and at its end; gives what it leaves."""

    def run(root, *callbacks, data=None, timed=True, reward=StartsWithDigit, **flags):
        timer, samples = [StepTimer()] * timed, RolloutSamples(2, prompts=3, completions=2)
        callbacks = (*timer, RunSummary(), Diagnosis(), build_adapter(), GracefulStop(), RunReport(), samples, *callbacks)
        policy, data = {"reward": reward(), "eval_samples": 4, "lr_lora": 0.1}, data or build_data(sums, validation_fraction=0.4)
        flags = {"num_sanity_val_steps": -1, "check_val_every_n_epoch": None, "val_check_interval": 4, "max_steps": 6, **flags}
        flags["logger"] = TensorBoardLogger(root, name="", default_hp_metric=False)
        with contextlib.redirect_stdout(io.StringIO()) as output:
            module = fit(model, sums, root, *callbacks, policy=policy, data=data, **flags)
        folder = root / "version_0"
        summary = json.loads((folder / "summary.json").read_text())
        return SimpleNamespace(folder=folder, policy=module, summary=summary, output=output.getvalue())

    return run


@pytest.fixture(scope="session")
def finished(measured, tmp_path_factory):
    saver = ModelCheckpoint(save_last=True, every_n_train_steps=2, filename="{step}", save_top_k=-1)
    return measured(tmp_path_factory.mktemp("finished"), saver, enable_checkpointing=True)


@pytest.fixture(scope="session")
def resumed(measured, finished, tmp_path_factory):
    return measured(tmp_path_factory.mktemp("resumed"), ckpt=finished.folder / "checkpoints" / "step=2.ckpt")
