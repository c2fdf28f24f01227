"""The verdict on killed jobs, and how a job's processes are found."""

import os
import signal
import sys
from dataclasses import replace

import pytest

from benchmarks.faults import kill_job
from benchmarks.faults import kill_ranks as report

RIGHT = report.Outcome("FSDP2, folder", "torchrun", 1, "write 3 + 2 ms", False, True, 1.5, 1, ("ours", "torchrun"), 3, 4, 0.0)


def test_a_job_is_right_only_if_all_is():
    for verdict, change in (
        ("processes were left", {"seconds": None}),
        ("ended with 0", {"code": 0}),
        ("said nothing", {"messages": ()}),
        ("x is not whole", {"error": "x is not whole"}),
        ("other weights", {"difference": 2e-5}),
        ("other weights", {"difference": None}),  # there was a checkpoint to resume from
        ("right", {"loaded": 0, "step": None, "difference": None}),
        ("right", {"messages": (), "alone": True}),  # no process was left to report anything
        ("right", {}),
    ):
        assert replace(RIGHT, **change).verdict == verdict


def test_who_says_that_a_process_is_gone_and_the_table_of_ways_to_write_and_to_start():
    ours = "rank 0 lost contact: rank 1 died; go on with --ckpt_path runs/last.ckpt"
    assert report.said(f"a\n{ours}\nb") == report.said("rank 1 ends: rank 0, which started it, has ended") == ("ours",)
    assert report.said("[rank: 1] Child process with PID 7 terminated with code -9. Forcefully") == ("Lightning",)
    assert report.said("  traceback : Signal 9 (SIGKILL) received by PID 7") == ("torchrun",)
    assert report.said("RuntimeError: Connection closed by peer") == ()
    outcomes = [RIGHT, replace(RIGHT, seconds=None, writing=False), replace(RIGHT, launcher="the command", difference=None)]
    lines = report.markdown(outcomes).splitlines()[2:]
    assert lines[0] == "| FSDP2, folder | torchrun | 2 | 1 | 1 | 2 | 0.0e+00 | 1.5 |"
    assert lines[1] == "| FSDP2, folder | the command | 1 | 0 | 1 | 0 | - | 1.5 |"


@pytest.fixture
def job(tmp_path):
    """One process that starts another, as rank 1."""
    child = "import subprocess, sys, os; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', 'fit'], "
    child += "env={**os.environ, 'LOCAL_RANK': '1'}); import time; time.sleep(60)"
    job = kill_job.Job([sys.executable, "-c", child, "fit"], tmp_path / "job", tmp_path / "log")
    yield job
    job.end(0.0)


def test_a_write_is_seen_as_long_as_it_lasts_and_all_processes_of_a_job_are_found_and_ended(job):
    assert not job.writes()
    job.checkpoints.mkdir(parents=True)
    (job.checkpoints / "last.ckpt").mkdir()
    assert not job.writes()
    (job.checkpoints / ".last.ckpt.part").mkdir()
    assert job.writes()
    assert job.wait(lambda: job.rank(1) is not None, 20)
    first, second = job.rank(0), job.rank(1)
    assert first == job.main.pid and second not in (first, None)
    os.kill(first, signal.SIGKILL)
    assert job.end(0.5) is None, "the second lived still"
    assert not job.family.members() and job.main.returncode == -signal.SIGKILL
