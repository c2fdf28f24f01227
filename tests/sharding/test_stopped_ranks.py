"""Ranks stop together, whichever of them a signal reaches; all save, and the run resumes as if it had not been stopped."""

import os
import re
import shlex
import signal
import time
from pathlib import Path

import pytest
import torch
from cli_runs import run as run_command
from cli_runs import write_folder
from ranks_of_tests import run, start
from stopped_runs import FIT, MOMENTS, Sent, points, run_of

from hybrid_lightning.adapters import AdapterPlan
from hybrid_lightning.errors import RewardError
from hybrid_lightning.rewards import JudgeReward
from hybrid_lightning.shared.stopping import StopSignals
from hybrid_lightning.training.loop import RLLoop

CONFIGS = Path(__file__).parents[2] / "configs" / "strategy"
STRATEGIES = {"ddp": "ddp.yaml", "fsdp2": "fsdp.yaml"}
# A run that is stopped again and again: what stops it, which is the moment, which of its calls since the stop before, and the
# ranks that hear of it; under FSDP2 all of them score, else rank 0 alone.
STOPS = {
    "ddp": [("a reward for scoring", 2, {0}), ("the middle of a later step", 6, {1}), ("a validation", 1, {0, 1})],
    "fsdp2": [
        *(("a score", 2, {1}), ("the second rollout", 2, {1})),
        *(("the middle of a later step", 2, {0}), ("the last update of an epoch", 6, {0})),
    ],
}
STEPS = {"ddp": 5, "fsdp2": 7}  # after two begins a rollout, after four comes a validation, after six ends an epoch


def stop_and_go_on(folder, name):
    """On each rank: a whole run, the runs that are stopped, and the last one, which continues to the end."""
    rank = int(os.environ["LOCAL_RANK"])
    fit = [*FIT[:2], f"--config={CONFIGS / STRATEGIES[name]}", *FIT[2:], "--trainer.devices=2"]
    fit.append(f"--trainer.max_steps={STEPS[name]}")
    results = [run_command(folder, *fit)]
    command = [*fit, "--trainer.strategy.save_distributed_checkpoint=true"] if name == "fsdp2" else fit
    for number, (moment, call, ranks) in enumerate(STOPS[name]):
        with pytest.MonkeyPatch.context() as patch:
            Sent(patch, (*MOMENTS[moment][:2], call), signal.SIGTERM if rank in ranks else 0)
            results.append(run_command(folder, *command))
        said = folder / f"{name} {number}"
        if rank == 0:  # which alone prints
            (folder / "said").write_text(results[-1].out)
            (folder / "said").rename(said)
        while not said.exists():
            time.sleep(0.05)
        commands = re.findall(r"hybrid_lightning (fit --config .+)", said.read_text())
        assert commands or "scoring starts over" in said.read_text(), f"{moment}: {results[-1]}"
        command = shlex.split(commands[-1]) if commands else command
    return [*results, run_command(folder, *command)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield from write_folder(tmp_path_factory.mktemp("stopped"))


@pytest.mark.long
@pytest.mark.parametrize("name", STRATEGIES)
def test_ranks_stop_together_and_go_on(folder, tmp_path, name):
    results, others = run(2, tmp_path, stop_and_go_on, timeout_s=300, folder=folder, name=name)
    codes = [0, *[143] * len(STOPS[name]), 0]
    for code, *both in zip(codes, results, others, strict=True):
        assert [result.code for result in both] == [code, code], (both[0].err[-2000:], both[1].err[-2000:])
    whole, *runs = (run_of(result, folder) for result in results if "scoring starts over" not in result.out)
    assert points(*runs) == points(whole)
    assert AdapterPlan.load(str(runs[-1] / "plan.json")) == AdapterPlan.load(str(whole / "plan.json"))
    if name == "fsdp2":  # one process tests what several have written into a folder
        (last,) = (path for path in (runs[-1] / "checkpoints").glob("last*.ckpt"))
        assert last.is_dir()
        one = ["--config", runs[-1] / "config.yaml", "--trainer.strategy=auto", "--trainer.devices=1"]
        result = run_command(folder, "test", *one, "--ckpt_path", last)
        assert result.code == 0 and "greedy_accuracy" in result.out, result.err[-2000:]


def fail_on_one_rank(folder):
    """On each rank: a run in which the judge of rank 1 fails in the second rollout."""
    rollouts, begin = [], RLLoop.begin

    def graded(judge, completions, prompts):
        if os.environ["LOCAL_RANK"] == "1" and len(rollouts) == 2:
            raise RewardError("the judge is gone")
        return [float(text[:1].isdigit()) for text in completions]

    given = ("=JudgeReward", ".rubric=Grade it.", ".base_url=http://localhost:9/v1", ".model=j")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RLLoop, "begin", lambda *given: rollouts.append(1) or begin(*given))
        patch.setattr(JudgeReward, "__call__", graded)
        options = ["--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.limit_val_batches=0", "--checkpoint.monitor=null"]
        options.append("--trainer.logger.name=judged")
        return run_command(folder, *FIT[:2], *options, "--adapter.scorer=Random", *(f"--model.reward{part}" for part in given))


@pytest.mark.long
def test_a_judge_that_fails_on_one_rank_ends_all_with_a_checkpoint(folder, tmp_path):
    for result in run(2, tmp_path, fail_on_one_rank, timeout_s=120, folder=folder):
        assert result.code == 1 and "error: the judge is gone" in result.err, result.err[-2000:]
    (saved,) = (folder / "runs" / "judged").rglob("stopped.ckpt")
    assert torch.load(saved, weights_only=False)["global_step"] == 2


def work_that_must_not_be_torn_apart(file):
    signals = StopSignals()
    signals.take_over()
    with signals.deferred():
        file.touch()
        time.sleep(60)


def test_a_second_signal_ends_the_process_where_it_is(tmp_path):
    (process,) = start(1, tmp_path, work_that_must_not_be_torn_apart, file=tmp_path / "begun")
    deadline = time.monotonic() + 120
    while not (tmp_path / "begun").exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    for number in range(2):
        os.kill(process.pid, signal.SIGTERM)
        process.join(20 if number else 0.5)
        assert process.exitcode == (128 + signal.SIGTERM if number else None)
