"""Stopped at any moment of its life, a run says how to go on, and whoever does so gets the curves of one that was not stopped."""

import contextlib
import itertools
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from cli_runs import Result, done, run, write_folder
from lightning.pytorch.callbacks import ModelCheckpoint
from stopped_runs import FIT, MOMENTS, Sent, points, run_of
from tiny_runs import DigitShare, Log, build_adapter, build_data, fit, trained

from hybrid_lightning import cli
from hybrid_lightning.adapters import AdapterPlan
from hybrid_lightning.callbacks import GracefulStop, RunFolder, RunSummary
from hybrid_lightning.callbacks.graceful_stop import lost_contact
from hybrid_lightning.errors import CheckpointError, RewardError, RolloutError
from hybrid_lightning.losses import GSPOLoss, TokenTruncation
from hybrid_lightning.policy import CosineSchedule, PolicyModule
from hybrid_lightning.rollout import Sampler, sampler
from hybrid_lightning.sharding.checkpoints import WholeFiles

# One after another in the life of one run: moments, and which of the calls since the stop before. Every run is a new one, which
# goes on from what the one before has left, so that each first moment is one of a run that has not been stopped.
CHAINS = {
    "all parts of scoring": {
        **{"later completions for scoring": 3, "a reward for scoring": 1, "the first update": 1, "the second rollout": 1},
        **{"the middle of a later step": 3, "a validation": 1},
    },
    "from the first completions": {
        **{"the first completions for scoring": 1, "the plan is written": 1, "the middle of the first step": 2},
        "the last update of an epoch": 10,
    },
    "from the first gradients": {
        **{"a gradient for scoring": 2, "the first validation": 1, "the first step is made": 1},
        **{"the step before a validation": 3, "the first rollout of an epoch": 2},
    },
    "from the first scores": {
        **{"a score": 3, "the first rollout": 1, "old log-probabilities": 2, "a checkpoint is saved": 1},
        **{"the last validation": 1, "the summary": 1},
    },
}
assert {moment for chain in CHAINS.values() for moment in chain} == set(MOMENTS)
# Without those that whoever runs the tests ignores, as nohup does, and so do the runs.
ALL = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SIGNALS = [number for number in ALL if signal.getsignal(number) is not signal.SIG_IGN]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield from write_folder(tmp_path_factory.mktemp("it's a stop"))


@pytest.fixture(scope="module")
def whole(folder):
    """Curves and plan of a whole run."""
    before = [signal.getsignal(number) for number in SIGNALS]
    result = done(folder, *FIT)
    assert [signal.getsignal(number) for number in SIGNALS] == before, "handlers are as before when a run is over"
    return points(run_of(result, folder)), AdapterPlan.load(str(run_of(result, folder) / "plan.json")).digest


def go_on(folder: Path, result: Result) -> Result:
    """Type what the stopped run says."""
    return run(folder, *shlex.split(re.findall(r"hybrid_lightning ((?:fit|score) --config .+)", result.out)[-1]))


@pytest.mark.parametrize("name", CHAINS)
def test_a_run_that_is_stopped_again_and_again_goes_on_as_if_it_had_not_been_stopped(folder, whole, name):
    result, runs = None, []
    for moment, call in CHAINS[name].items():
        number = SIGNALS[list(MOMENTS).index(moment) % len(SIGNALS)]
        with pytest.MonkeyPatch.context() as patch:
            place, function, _ = MOMENTS[moment]
            sent = Sent(patch, (place, function, call), number)
            result = go_on(folder, result) if runs else run(folder, *FIT)
        assert sent.calls >= sent.call, f"{moment}: the moment never came"
        assert result.code == 128 + number, (moment, result.err[-2000:])
        runs.append(run_of(result, folder))
    result = go_on(folder, result)
    assert result.code == 0, result.err[-2000:]
    runs.append(run_of(result, folder))
    assert points(*runs) == whole[0]
    assert AdapterPlan.load(str(runs[-1] / "plan.json")).digest == whole[1]


def test_stopped_scoring_goes_on_by_the_same_command_with_the_same_settings(folder, whole, monkeypatch):
    with monkeypatch.context() as patch:
        Sent(patch, MOMENTS["a score"], signal.SIGTERM)
        stopped = run(folder, "score", *FIT[1:])
    assert stopped.code == 143
    found = run_of(stopped, folder) / "scoring"
    refused = run(folder, *FIT, f"--ckpt_path={found}", "--data.source.validation_fraction=0.4")
    assert refused.code == 1 and re.search("was found with calibration prompts=.*new run without ckpt_path", refused.last)
    refused = run(folder, "test", "--config=t.yaml", f"--ckpt_path={found}")
    assert refused.code == 1 and "is no checkpoint, but what scoring has found" in refused.last
    done(folder, *FIT, f"--ckpt_path={found}", "--model.lr_lora=0.02", "--trainer.max_steps=1")
    resumed = go_on(folder, stopped)
    assert resumed.code == 0, resumed.err[-2000:]
    assert AdapterPlan.load(str(run_of(resumed, folder) / "plan.json")).digest == whole[1]


@pytest.mark.parametrize(("command", "call"), [("test", 2), ("predict", 1)])
def test_an_evaluation_is_begun_again(folder, command, call, monkeypatch):
    Sent(monkeypatch, (Sampler, "sample", call), signal.SIGTERM)
    stopped = run(folder, command, "--config=t.yaml")
    assert stopped.code == 143 and "start the command again" in stopped.out


def test_what_keeps_a_stop_from_saving_is_said(folder, monkeypatch):
    full = CheckpointError("stopped.ckpt could not be written: No space left on device")
    monkeypatch.setattr(WholeFiles, "save_checkpoint", Mock(side_effect=full))
    Sent(monkeypatch, MOMENTS["the second rollout"], signal.SIGTERM)
    stopped = run(folder, *FIT)
    assert stopped.code == 143 and stopped.last == "error: stopped.ckpt could not be written: No space left on device"


# ---- another process has gone


def lost_trainer(saved=None, resumed=None, folder=None):
    callback, holder = None if saved is None else ModelCheckpoint(), RunFolder()
    if callback is not None:
        callback._last_checkpoint_saved, callback.last_model_path = saved, "runs/being_written.ckpt"
    holder.path = folder
    return SimpleNamespace(global_rank=3, world_size=4, checkpoint_callback=callback, ckpt_path=resumed, callbacks=[holder])


def test_it_names_the_cause_and_the_checkpoint_at_once_and_at_the_end_of_the_traceback(tmp_path, capsys):
    folder = tmp_path / "my runs"
    folder.mkdir()
    (folder / "config.yaml").touch()
    command = f" -m hybrid_lightning fit --config '{folder}/config.yaml' --ckpt_path last.ckpt"
    texts = ("[gloo/pair.cc:537] Read error: Connection reset by peer", "Watchdog caught collective operation timeout: Work")
    for text, trainer, remedy in (
        (texts[0], lost_trainer("runs/last.ckpt", "old.ckpt"), "--ckpt_path runs/last.ckpt"),
        (texts[1], lost_trainer("", "old.ckpt"), "--ckpt_path old.ckpt"),
        (texts[0], lost_trainer(), "no checkpoint has been saved yet"),
        (texts[1], lost_trainer("", None), "no checkpoint has been saved yet"),
        (texts[0], lost_trainer("last.ckpt", folder=folder), command),
    ):
        error = RuntimeError(text)
        GracefulStop().on_exception(trainer, None, error)
        line = capsys.readouterr().err
        assert line.startswith("rank 3 lost contact") and line.endswith(f"{remedy}\n") and line.count("\n") == 1
        assert "".join(traceback.format_exception(error)).endswith(line)
    for error in (RuntimeError("shape mismatch"), ValueError(texts[0]), KeyboardInterrupt()):
        assert lost_contact(lost_trainer(), error) is None, "other errors are a process's own"


def test_it_names_the_rank_whose_process_is_gone_and_the_command_prints_no_traceback(monkeypatch, capsys):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        trainer, stop, error = lost_trainer(), GracefulStop(), RuntimeError("Connection reset by peer")
        stop._processes = [(platform.node(), os.getpid()), (platform.node(), process.pid), ("elsewhere", process.pid)]
        trainer.callbacks.append(stop)
        assert "another rank was killed, has failed or hangs" in lost_contact(trainer, error)
        process.kill()  # nobody has asked for its exit code yet, as where the launcher has not looked
        stop.on_exception(trainer, None, error)
    monkeypatch.setattr(cli, "HybridLightningCLI", Mock(side_effect=error))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("rank 3 lost contact: rank 1 died;") and said.err.count("\n") == 1


def test_the_cause_of_a_failure_comes_before_the_checkpoint(folder, monkeypatch):
    roll_out, calls = PolicyModule.roll_out, itertools.count(1)

    def fail(*arguments, **options):
        if next(calls) == 2:
            raise RolloutError("no server; start it")
        return roll_out(*arguments, **options)

    monkeypatch.setattr(PolicyModule, "roll_out", fail)
    monkeypatch.setattr(cli, "print_error", print)  # into the same stream
    *_, cause, saved, command = run(folder, *FIT).out.splitlines()
    assert (cause, saved) == ("no server; start it", "Checkpoint saved. Go on with:") and command.endswith("stopped.ckpt")


# ---- in Python, bit for bit


STEPS = 8


def fitted(model, sums, root, *callbacks, ckpt=None):
    """Step, loss, and how far the sampler's log-probabilities are from training's, of each micro-batch; and the policy."""
    policy = {"loss": GSPOLoss(kl_coef=0.01), "correction": TokenTruncation(cap=3.0), "schedule": CosineSchedule(warmup_steps=2)}
    policy |= {"minibatches_per_rollout": 2, "epochs_per_rollout": 2}
    log, adapter, module = Log(), build_adapter(dropout=0.1, calibration_prompts=8), None
    flags = {"max_steps": STEPS, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "val_check_interval": 8}
    flags |= {"check_val_every_n_epoch": None, "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks)}
    callbacks = (RunSummary(), adapter, *callbacks, log, GracefulStop())
    data = build_data(sums, validation_fraction=0.2)
    with contextlib.suppress(SystemExit):  # a stopped run ends the program
        module = fit(model, sums, root, *callbacks, policy=policy, data=data, ckpt=ckpt, **flags)
    return [(step["loss"], step["sampling/logp_difference/mean"]) for step in log.metrics], module


@pytest.fixture(scope="module")
def exact(model, sums, tmp_path_factory):
    """The losses, the policy, and a folder with checkpoints of all steps."""
    root = tmp_path_factory.mktemp("exact")
    losses, policy = fitted(model, sums, root, ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1))
    assert len(losses) == 2 * STEPS and all(len(set(values)) > 6 for values in zip(*losses, strict=True))
    return losses, policy, root


def assert_goes_on(model, sums, folder, exact, checkpoint="version_0/checkpoints/stopped.ckpt"):
    """From a checkpoint to the end as the run that was not stopped."""
    checkpoint = folder / checkpoint
    step = torch.load(checkpoint, weights_only=True)["global_step"]
    losses, other, _ = exact
    rest, policy = fitted(model, sums, folder, ckpt=checkpoint)
    assert 0 <= step < STEPS and rest == losses[2 * step :]
    weights, expected = trained(policy), trained(other)
    assert weights.keys() == expected.keys() and all(torch.equal(weight, expected[name]) for name, weight in weights.items())
    return step


def test_a_signal_within_completions_leaves_a_checkpoint_that_resumes_exactly(model, sums, tmp_path, exact, monkeypatch):
    with monkeypatch.context() as patch:
        Sent(patch, (sampler._Decoder, "_choose", 33), signal.SIGTERM)
        first, _ = fitted(model, sums, tmp_path)
    step = assert_goes_on(model, sums, tmp_path, exact)
    assert 2 * step <= len(first) < len(exact[0]) and first == exact[0][: len(first)]


def test_a_reward_that_fails_leaves_a_checkpoint_that_resumes_exactly(model, sums, tmp_path, exact, monkeypatch):
    calls = []

    def failing(self, completions, prompts):
        calls.append(len(completions))
        if calls.count(16) > 3:  # two of calibration and the first rollout; validation has others
            raise ValueError("the quota is used up")
        return working(self, completions, prompts)

    working = DigitShare.__call__
    monkeypatch.setattr(DigitShare, "__call__", failing)
    with pytest.raises(RewardError, match=r"the quota is used up \(test_graceful_stop.py line \d+\)"):
        fitted(model, sums, tmp_path)
    monkeypatch.undo()
    assert assert_goes_on(model, sums, tmp_path, exact) > 0
    assert assert_goes_on(model, sums, tmp_path, exact, exact[2] / "step=5.ckpt") == 5, "one of the second rollout, too"
