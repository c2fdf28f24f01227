"""A rank ends with the one that started it, at any time of the run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hybrid_lightning
from hybrid_lightning.sharding import starter
from hybrid_lightning.stopping import StopSignals

ROOT = Path(hybrid_lightning.__file__).parents[1]
RANK = """
import os, sys, time
from hybrid_lightning.sharding import starter
from hybrid_lightning.stopping import StopSignals
end, os._exit = os._exit, lambda code: (print("code", code, flush=True), end(code))
seconds, starter._GRACE_S = map(float, sys.argv[1:])
signals = StopSignals()
assert starter.end_with_starter(signals)
signals.last_words = lambda: "go on with last.ckpt"
print("waits", flush=True)
time.sleep(seconds)
print("to the end")
"""
STARTER = 'LOCAL_RANK=1 HYBRID_LIGHTNING_STARTER=$$ "$@" & wait'
CASES = {
    "waits without end": (
        60,
        0.5,
        "code 1\n",
        "rank 1 ends: rank 0, which started it, has ended; see the output of rank 0 for the reason",
    ),
    "ends by itself": (1.5, 600, "to the end\n", ""),  # with a message of its own, or as the starter has
}


@pytest.mark.parametrize("case", CASES)
def test_it_ends_unless_it_does_so_by_itself(case):
    seconds, grace, printed, message = CASES[case]
    command = ["sh", "-c", STARTER, "sh", sys.executable, "-c", RANK, str(seconds), str(grace)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "waits\n"
    time.sleep(0.6)  # it looks every half second
    os.kill(process.pid, signal.SIGKILL)
    out, said = process.communicate(timeout=120)  # which ends with the last process that can write
    assert (out, said) == (printed, message and f"{message}; go on with last.ckpt\n")


@pytest.mark.parametrize("named", [False, True])
def test_who_is_started_by_others_is_not_watched(monkeypatch, named):
    """By torchrun, or from within another run."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("HYBRID_LIGHTNING_STARTER", str(os.getpid()))  # which has not started this process
    if not named:
        monkeypatch.delenv("HYBRID_LIGHTNING_STARTER")
    monkeypatch.setattr(starter.threading, "Thread", None)
    assert not starter.end_with_starter(StopSignals())
    assert os.environ["HYBRID_LIGHTNING_STARTER"] == str(os.getpid())
