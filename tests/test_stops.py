"""Stopped at any moment of its life, a run says how to go on, and whoever does so gets the curves of one that was not stopped."""

import os
import re
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_runs import Result, run, write_folder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hybrid_lightning.adapters import collect, scores
from hybrid_lightning.adapters.plan import AdapterPlan
from hybrid_lightning.callbacks import RunSummary
from hybrid_lightning.errors import CheckpointError
from hybrid_lightning.policy import evaluated
from hybrid_lightning.policy.module import PolicyModule
from hybrid_lightning.rollout.sampler import Sampler
from hybrid_lightning.sharding.whole_files import WholeFiles

# An epoch has three rollouts of two steps of two micro-batches; a validation comes after the fourth step, and one at the end.
FIT = (
    "fit",
    "--config=t.yaml",
    "--trainer.max_steps=7",
    "--trainer.val_check_interval=8",
    "--trainer.accumulate_grad_batches=2",
    "--data.source.validation_fraction=0.5",
    "--data.validation_prompts=4",
    "--adapter.dropout=0.1",
    "--model.max_tokens_per_micro_batch=100",
    "--checkpoint.monitor=val/avg@2",
)
# Where a signal comes: a function, and which of its calls. Three rollouts score the modules.
MOMENTS: dict[str, tuple[Any, str, int]] = {
    "the first completions for scoring": (Sampler, "sample", 1),
    "later completions for scoring": (Sampler, "sample", 3),
    "a reward for scoring": (evaluated, "evaluate_reward", 2),
    "a gradient for scoring": (collect, "_check_loss", 2),
    "a score": (scores, "_statistics", 3),
    "the plan is written": (AdapterPlan, "save", 1),
    "the first validation": (PolicyModule, "_sample", 1),
    "the first rollout": (PolicyModule, "roll_out", 1),
    "the first reward": (evaluated, "evaluate_reward", 6),
    "the first update": (PolicyModule, "_run", 1),
    "the middle of the first step": (PolicyModule, "training_step", 2),
    "the first step is made": (PolicyModule, "on_before_optimizer_step", 1),
    "old log-probabilities": (PolicyModule, "add_logprobs", 2),
    "the second rollout": (PolicyModule, "roll_out", 2),
    "the middle of a later step": (PolicyModule, "training_step", 6),
    "the step before a validation": (PolicyModule, "on_before_optimizer_step", 4),
    "a validation": (PolicyModule, "_sample", 2),
    "a checkpoint is saved": (WholeFiles, "save_checkpoint", 1),
    "the last update of an epoch": (PolicyModule, "training_step", 12),
    "the first rollout of an epoch": (PolicyModule, "roll_out", 4),
    "the last validation": (PolicyModule, "_sample", 3),
    "the summary": (RunSummary, "_summary", 1),
}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield from write_folder(tmp_path_factory.mktemp("stops"))


class Sent:
    """Sends a signal to this process as a function is called for the n-th time."""

    def __init__(self, patch: pytest.MonkeyPatch, moment: tuple[Any, str, int], number: int) -> None:
        place, name, self.call = moment
        self.number, self.calls = number, 0
        patch.setattr(place, name, self._wrapped(getattr(place, name)))

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self.call:
                os.kill(os.getpid(), self.number)
            return function(*arguments, **options)

        return wrapper


def points(*runs: Path) -> dict[tuple[str, int], float]:
    """All points of the curves of runs, but for times; those that two of them have are the same."""
    found: dict[tuple[str, int], float] = {}
    for folder in runs:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            if tag.startswith(("time/", "throughput/")) or "time step_s" in tag or "throughput" in tag:
                continue
            for event in events.Scalars(tag):
                assert found.setdefault((tag, event.step), event.value) == event.value, (tag, event.step)
    return found


def run_of(result: Result, folder: Path) -> Path:
    """The run folder that a command names last."""
    return folder / re.findall(r"(runs/default/version_\d+)", result.out)[-1]


@pytest.fixture(scope="module")
def whole(folder):
    result = run(folder, *FIT)
    assert result.code == 0, result.err
    return points(run_of(result, folder)), AdapterPlan.load(str(run_of(result, folder) / "plan.json")).digest


def go_on(folder: Path, result: Result) -> Result:
    """Type what the stopped run says."""
    return run(folder, *shlex.split(re.findall(r"hybrid_lightning ((?:fit|score) --config .+)", result.out)[-1]))


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(folder, whole, moment, monkeypatch):
    number = SIGNALS[list(MOMENTS).index(moment) % len(SIGNALS)]
    with monkeypatch.context() as patch:
        sent = Sent(patch, MOMENTS[moment], number)
        stopped = run(folder, *FIT)
    assert sent.calls >= sent.call, "the moment never came"
    assert stopped.code == 128 + number, stopped.err[-2000:]
    resumed = go_on(folder, stopped)
    assert resumed.code == 0, resumed.err[-2000:]
    runs = (run_of(stopped, folder), run_of(resumed, folder))
    assert points(*runs) == whole[0]
    assert AdapterPlan.load(str(runs[1] / "plan.json")).digest == whole[1]


def test_a_run_may_be_stopped_again_and_again(folder, whole):
    result, runs = None, []
    for moment in (
        "later completions for scoring",
        "a score",
        "the first update",
        "the first rollout",
        "the second rollout",
        "a validation",
    ):
        with pytest.MonkeyPatch.context() as patch:
            place, name, call = MOMENTS[moment]
            Sent(patch, (place, name, 1 if runs and moment != "a score" else call), signal.SIGTERM)
            result = go_on(folder, result) if runs else run(folder, *FIT)
        assert result.code == 143, (moment, result.err[-2000:])
        runs.append(run_of(result, folder))
    result = go_on(folder, result)
    assert result.code == 0, result.err[-2000:]
    assert points(*runs, run_of(result, folder)) == whole[0]


def test_stopped_scoring_goes_on_by_the_same_command(folder, whole, monkeypatch):
    with monkeypatch.context() as patch:
        Sent(patch, MOMENTS["a score"], signal.SIGTERM)
        stopped = run(folder, "score", *FIT[1:])
    assert stopped.code == 143
    resumed = go_on(folder, stopped)
    assert resumed.code == 0, resumed.err[-2000:]
    assert AdapterPlan.load(str(run_of(resumed, folder) / "plan.json")).digest == whole[1]


def test_what_scoring_found_is_for_the_same_settings_alone(folder, monkeypatch):
    with monkeypatch.context() as patch:
        Sent(patch, MOMENTS["a score"], signal.SIGTERM)
        found = run_of(run(folder, *FIT), folder) / "scoring"
    for option, name in {
        "--adapter.rank=1": "adapter.rank=2",
        "--model.seed=3": "model.seed=0",
        "--data.source.validation_fraction=0.4": "calibration prompts=",
    }.items():
        refused = run(folder, *FIT, f"--ckpt_path={found}", option)
        assert refused.code == 1 and f"was found with {name}" in refused.last and "new run without ckpt_path" in refused.last
    refused = run(folder, "test", "--config=t.yaml", f"--ckpt_path={found}")
    assert refused.code == 1 and "is no checkpoint, but what scoring has found" in refused.last
    other = run(folder, *FIT, f"--ckpt_path={found}", "--model.lr_lora=0.02", "--trainer.max_steps=1")
    assert other.code == 0, "what no score depends on may be changed"


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_an_evaluation_is_begun_again(folder, command, monkeypatch):
    Sent(monkeypatch, (Sampler, "sample", 2 if command != "predict" else 1), signal.SIGTERM)
    stopped = run(folder, command, "--config=t.yaml")
    assert stopped.code == 143 and "start the command again" in stopped.out


def test_what_keeps_a_stop_from_saving_is_said(folder, monkeypatch):
    def full(*_, **__):
        raise CheckpointError("stopped.ckpt could not be written: No space left on device")

    monkeypatch.setattr(WholeFiles, "save_checkpoint", full)
    Sent(monkeypatch, MOMENTS["the second rollout"], signal.SIGTERM)
    stopped = run(folder, *FIT)
    assert stopped.code == 143 and stopped.last == "error: stopped.ckpt could not be written: No space left on device"


def test_handlers_are_as_before_when_a_run_is_over(folder):
    before = [signal.getsignal(number) for number in SIGNALS]
    run(folder, *FIT, "--trainer.max_steps=1")
    assert [signal.getsignal(number) for number in SIGNALS] == before
