"""Ranks stop together, whichever of them a signal reaches, all save, and the run goes on as if it had not been stopped."""

import os
import re
import shlex
import signal
import time
from pathlib import Path

import pytest
from cli_runs import run as run_command
from cli_runs import write_folder
from lightning.pytorch import Callback
from ranks_of_tests import run, start
from stopped_runs import FIT, MOMENTS, Sent, points, run_of

from hybrid_lightning.adapters import AdapterPlan

CONFIGS = Path(__file__).parents[2] / "configs" / "strategy"
STRATEGIES = {"ddp": "ddp.yaml", "fsdp2": "fsdp2.yaml", "fsdp1": "fsdp.yaml"}
SHARDED = ["--trainer.strategy.save_distributed_checkpoint=true"]
# Runs that are stopped again and again: options, and what stops each run: the moment, which of its calls since the stop before,
# and the ranks that hear of it; under FSDP2 all of them score, else rank 0 alone. A first stop is one of a run that has not been
# stopped.
STOPS = {
    "ddp": [([], [("a reward for scoring", 2, {0}), ("the middle of a later step", 6, {1}), ("a validation", 1, {0, 1})])],
    "fsdp2": [
        (
            SHARDED,
            [
                ("a gradient for scoring", 1, {0}),
                ("a score", 2, {1}),
                ("the first rollout", 1, {1}),
                ("the middle of a later step", 6, {0}),
                ("the last update of an epoch", 6, {0}),
            ],
        )
    ],
    "fsdp1": [([], [("the second rollout", 2, {1})])],
}


def stop_and_go_on(folder, name):
    """On each rank: a whole run, and those of each chain of stops with the last one, which goes on to the end."""
    rank = int(os.environ["LOCAL_RANK"])
    fit = [*FIT[:2], f"--config={CONFIGS / STRATEGIES[name]}", *FIT[2:], "--trainer.devices=2"]
    if name != "fsdp2":  # whose runs alone are stopped as late as at the end of an epoch
        fit.append("--trainer.max_steps=5")
    whole, chains = run_command(folder, *fit), []
    for options, stops in STOPS[name]:
        command, results = [*fit, *options], []
        for moment, call, ranks in stops:
            with pytest.MonkeyPatch.context() as patch:
                Sent(patch, (*MOMENTS[moment][:2], call), signal.SIGTERM if rank in ranks else 0)
                results.append(run_command(folder, *command))
            said = folder / f"{name} {len(chains)} {len(results)}"
            if rank == 0:  # which alone prints
                (folder / "said").write_text(results[-1].out)
                (folder / "said").rename(said)
            while not said.exists():
                time.sleep(0.05)
            commands = re.findall(r"hybrid_lightning (fit --config .+)", said.read_text())
            assert commands, f"{moment}: {results[-1]}"
            command = shlex.split(commands[-1])
        chains.append([*results, run_command(folder, *command)])
    return whole, chains


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield from write_folder(tmp_path_factory.mktemp("stopped"))


@pytest.mark.parametrize("name", STRATEGIES)
def test_ranks_stop_together_and_go_on(folder, tmp_path, name):
    (whole, chains), (other_whole, other_chains) = run(2, tmp_path, stop_and_go_on, timeout_s=300, folder=folder, name=name)
    assert whole.code == other_whole.code == 0, whole.err[-2000:]
    expected = points(run_of(whole, folder))
    digest = AdapterPlan.load(str(run_of(whole, folder) / "plan.json")).digest
    for (_, stops), *results in zip(STOPS[name], chains, other_chains, strict=True):
        *stopped, (resumed, other) = zip(*results, strict=True)
        for (moment, *_), both in zip(stops, stopped, strict=True):
            assert [result.code for result in both] == [143, 143], (moment, both[0].err[-2000:], both[1].err[-2000:])
        assert resumed.code == other.code == 0, (stops, resumed.err[-2000:])
        runs = [run_of(result, folder) for result in results[0]]
        assert points(*runs) == expected, stops
        assert AdapterPlan.load(str(runs[-1] / "plan.json")).digest == digest, stops


class Slow(Callback):
    """Takes long where a signal must not tear the run apart, once a checkpoint is there."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 4:
            Path("slow").touch()
            time.sleep(300)


def fit_with(folder, callback):
    run_command(folder, *FIT, f"--trainer.callbacks+={callback.__module__}.{callback.__name__}")


def test_a_second_signal_ends_the_process_where_it_is(folder, tmp_path):
    (process,) = start(1, tmp_path, fit_with, folder=folder, callback=Slow)
    deadline = time.monotonic() + 120
    while not (folder / "slow").exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    (folder / "slow").unlink()
    os.kill(process.pid, signal.SIGTERM)
    process.join(1)
    assert process.is_alive(), "a step that is being made is not torn apart"
    os.kill(process.pid, signal.SIGTERM)
    process.join(20)
    assert process.exitcode == 128 + signal.SIGTERM
