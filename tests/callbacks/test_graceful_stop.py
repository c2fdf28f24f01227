"""Stopped at any moment, a run prints how to resume, and the resumed run has the curves of a run that was not stopped."""

import re
import shlex
import signal
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from cli_runs import Result, done, run, write_folder
from lightning.pytorch.callbacks import ModelCheckpoint
from long_cases import long_but
from stopped_runs import FIT, MOMENTS, Sent, points, run_of

from hybrid_lightning.adapters import AdapterPlan
from hybrid_lightning.callbacks import GracefulStop, RunFolder
from hybrid_lightning.callbacks.graceful_stop import lost_contact
from hybrid_lightning.cli import main as cli
from hybrid_lightning.errors import CheckpointError
from hybrid_lightning.rollout import Sampler
from hybrid_lightning.sharding.checkpoints import WholeFiles

# One after another in the life of one run: moments, and which of the calls since the stop before. Every run is a new one, which
# continues what the one before left, so that each first moment is one of a run that has not been stopped.
CHAINS = {
    "from the first completions": {
        **{"the first completions for scoring": 1, "the plan is written": 1, "the middle of the first step": 2},
        **{"the second rollout": 1, "the middle of a later step": 3, "a validation": 1},
    },
    "from the first gradients": {
        **{"a gradient for scoring": 2, "the first validation": 1, "the step before a validation": 4},
        **{"the last update of an epoch": 4, "the first rollout of an epoch": 1},
    },
    "from the first scores": {
        **{"a score": 3, "the first rollout": 1, "old log-probabilities": 2, "a checkpoint is saved": 1},
        **{"the last validation": 1, "the summary": 1},
    },
}
STARTS_OVER = "start the command again (scoring starts over)"
# Without the signals that the caller of the tests ignores (nohup does): the runs ignore them too.
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
    """Run the command that the stopped run prints; a run that was stopped before it trained is started again."""
    commands = re.findall(r"hybrid_lightning (fit --config .+)", result.out)
    return run(folder, *(shlex.split(commands[-1]) if commands else FIT))


@pytest.mark.parametrize("name", long_but(CHAINS, 1))
def test_a_run_that_is_stopped_again_and_again_resumes_as_if_it_had_not_been_stopped(folder, whole, name):
    result, runs = None, []
    for moment, call in CHAINS[name].items():
        number = SIGNALS[list(MOMENTS).index(moment) % len(SIGNALS)]
        with pytest.MonkeyPatch.context() as patch:
            place, function, _ = MOMENTS[moment]
            sent = Sent(patch, (place, function, call), number)
            result = go_on(folder, result) if result else run(folder, *FIT)
        assert sent.calls >= sent.call, f"{moment}: the moment never came"
        assert result.code == 128 + number, (moment, result.err[-2000:])
        if moment in ("the plan is written", "the first validation") or "scor" in moment:
            assert STARTS_OVER in result.out, moment
        else:
            runs.append(run_of(result, folder))
    result = go_on(folder, result)
    assert result.code == 0, result.err[-2000:]
    runs.append(run_of(result, folder))
    assert points(*runs) == whole[0]
    assert AdapterPlan.load(str(runs[-1] / "plan.json")).digest == whole[1]


def test_stopped_scoring_leaves_nothing_and_begins_anew(folder, whole, monkeypatch):
    before = {*(folder / "runs").rglob("*")}
    with monkeypatch.context() as patch:
        Sent(patch, MOMENTS["a score"], signal.SIGTERM)
        stopped = run(folder, "score", *FIT[1:])
    assert stopped.code == 143 and STARTS_OVER in stopped.out
    assert {*(folder / "runs").rglob("*")} == before
    scored = done(folder, "score", *FIT[1:])
    assert AdapterPlan.load(str(run_of(scored, folder) / "plan.json")).digest == whole[1]


def test_an_evaluation_is_begun_again(folder, monkeypatch):
    Sent(monkeypatch, (Sampler, "sample", 2), signal.SIGTERM)
    stopped = run(folder, "test", "--config=t.yaml")
    assert stopped.code == 143 and "start the command again" in stopped.out


def test_what_keeps_a_stop_from_saving_is_said(folder, monkeypatch):
    monkeypatch.setattr(WholeFiles, "save_checkpoint", Mock(side_effect=CheckpointError("the disk is full")))
    Sent(monkeypatch, MOMENTS["the second rollout"], signal.SIGTERM)
    stopped = run(folder, *FIT)
    assert stopped.code == 143 and stopped.last == "error: the disk is full"


# ---- another process has gone


def lost_trainer(saved="", resumed=None, folder=None):
    callback, holder = ModelCheckpoint(), RunFolder()
    callback._last_checkpoint_saved, callback.last_model_path, holder.path = saved, "runs/being_written.ckpt", folder
    return SimpleNamespace(global_rank=3, world_size=4, checkpoint_callback=callback, ckpt_path=resumed, callbacks=[holder])


def test_it_names_the_cause_and_the_checkpoint_at_once_and_the_command_prints_no_traceback(tmp_path, monkeypatch, capsys):
    """Which rank has died: `test_a_rank_dies`."""
    (folder := tmp_path / "my runs").mkdir()
    (folder / "config.yaml").touch()
    command = f" -m hybrid_lightning fit --config '{folder}/config.yaml' --ckpt_path last.ckpt"
    texts = ("[gloo/pair.cc:537] Read error: Connection reset by peer", "Watchdog caught collective operation timeout: Work")
    for text, trainer, remedy in (
        (texts[0], lost_trainer("runs/last.ckpt", "old.ckpt"), "--ckpt_path runs/last.ckpt"),
        (texts[1], lost_trainer("", "old.ckpt"), "--ckpt_path old.ckpt"),
        (texts[0], lost_trainer(), "no checkpoint has been saved yet"),
        (texts[0], lost_trainer("last.ckpt", folder=folder), command),
    ):
        lost = RuntimeError(text)
        GracefulStop().on_exception(trainer, None, lost)
        line = capsys.readouterr().err
        assert line.startswith("rank 3 lost contact: another rank was killed, has failed or hangs;")
        assert line.endswith(f"{remedy}\n") and line.count("\n") == 1
        assert "".join(traceback.format_exception(lost)).endswith(line)
    for error in (RuntimeError("shape mismatch"), ValueError(texts[0]), KeyboardInterrupt()):
        assert lost_contact(lost_trainer(), error) is None, "other errors are a process's own"
    monkeypatch.setattr(cli, "HybridLightningCLI", Mock(side_effect=lost))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1 and capsys.readouterr() == ("", "")


# ---- a reward fails


def test_a_reward_that_fails_is_the_cause_and_leaves_a_checkpoint_to_resume_from(folder, whole, monkeypatch):
    reward, calls = sys.modules["my_parts"].StartsWithDigit, []
    working = reward.__call__

    def failing(self, completions, prompts):
        calls.append(len(completions))
        if calls.count(16) > 4:  # three of calibration and the first rollout; validation has others
            raise ValueError("the quota is used up")
        return working(self, completions, prompts)

    with monkeypatch.context() as patch:
        patch.setattr(reward, "__call__", failing)
        patch.setattr(cli, "print_error", print)  # into the same stream
        failed = run(folder, *FIT)
    *_, cause, saved, command = failed.out.splitlines()
    assert re.search(r"the quota is used up \(test_graceful_stop.py line \d+\)", cause) and saved.startswith("Checkpoint saved")
    assert failed.code == 1 and command.endswith("stopped.ckpt")
    resumed = go_on(folder, failed)
    assert resumed.code == 0, resumed.err[-2000:]
    assert points(run_of(failed, folder), run_of(resumed, folder)) == whole[0]
