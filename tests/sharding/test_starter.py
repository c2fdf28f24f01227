"""A rank ends with the one that started it, as long as the ranks have not come together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hybrid_lightning
from hybrid_lightning.sharding import starter

ROOT = Path(hybrid_lightning.__file__).parents[1]
RANK = """
import sys, time, types
from hybrid_lightning.sharding.starter import end_with_starter
end_with_starter()
sys.modules["torch.distributed"] = types.SimpleNamespace(is_initialized=lambda: {joined})
print("waits", flush=True)
time.sleep(1.5 if {joined} else 30)
print("to the end")
"""
STARTER = 'LOCAL_RANK=1 HYBRID_LIGHTNING_STARTER=$$ "$0" -c "$1" & wait'


@pytest.mark.parametrize("joined", [False, True])
def test_it_ends_unless_all_have_come_together(joined):
    command = ["sh", "-c", STARTER, sys.executable, RANK.format(joined=joined)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "waits\n"
    time.sleep(0.6)  # it looks every half second whether all have come
    os.kill(process.pid, signal.SIGKILL)
    out, said = process.communicate(timeout=30)  # which ends with the last process that can write
    assert out == ("to the end\n" if joined else "")
    assert said.startswith("rank 1 ends: rank 0, which started it, was killed") != joined


@pytest.mark.parametrize("other", [None, "1"])
def test_who_is_started_by_others_is_not_watched(monkeypatch, other):
    """By torchrun, or from within another run."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("HYBRID_LIGHTNING_STARTER", other or "")
    if other is None:
        monkeypatch.delenv("HYBRID_LIGHTNING_STARTER")
    monkeypatch.setattr(starter.threading, "Thread", None)
    assert not starter.end_with_starter()
    assert os.environ["HYBRID_LIGHTNING_STARTER"] == str(os.getpid())
