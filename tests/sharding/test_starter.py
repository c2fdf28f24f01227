"""Which ranks watch the process that started them. That they end with it is seen in `test_a_rank_dies`."""

import os

import pytest

from hybrid_lightning.sharding import starter
from hybrid_lightning.shared.stopping import StopSignals


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
