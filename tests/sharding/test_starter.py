"""A rank ends with the one that started it, as long as the ranks have not come together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hybrid_lightning

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
STARTER = """
import os, subprocess, sys, time
from hybrid_lightning.sharding.starter import end_with_starter
end_with_starter()
subprocess.Popen([sys.executable, "-c", sys.argv[1]], env={**os.environ, "LOCAL_RANK": "1"})
time.sleep(60)
"""


def start(joined):
    """The process of a starter, whose output is that of the rank it has started, too."""
    environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "HYBRID_LIGHTNING_STARTER")}
    command = [sys.executable, "-c", STARTER, RANK.format(joined=joined)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "waits\n"
    return process


@pytest.mark.parametrize("joined", [False, True])
def test_it_ends_unless_all_have_come_together(joined):
    process = start(joined)
    time.sleep(0.6)  # it looks every half second whether all have come
    os.kill(process.pid, signal.SIGKILL)
    out, said = process.communicate(timeout=30)  # which ends with the last process that can write
    assert out == ("to the end\n" if joined else "")
    assert said.startswith("rank 1 ends: rank 0, which started it, was killed") != joined


@pytest.mark.parametrize("starter", [None, "1"])
def test_who_is_started_by_others_is_not_watched(monkeypatch, starter):
    """By torchrun, or from within another run."""
    from hybrid_lightning.sharding import starter as module

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("HYBRID_LIGHTNING_STARTER", starter or "")
    if starter is None:
        monkeypatch.delenv("HYBRID_LIGHTNING_STARTER")
    monkeypatch.setattr(module.threading, "Thread", None)
    module.end_with_starter()
    assert os.environ["HYBRID_LIGHTNING_STARTER"] == str(os.getpid())
