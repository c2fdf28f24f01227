from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid_lightning.training import step_times
from hybrid_lightning.training.step_times import Amortized, PhaseClock


@pytest.fixture
def wait(monkeypatch):
    """Lets time pass, by the test's amount."""
    now = [100.0]
    monkeypatch.setattr(step_times, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def wait(seconds):
        now[0] += seconds

    return wait


def test_a_phase_ends_with_an_exception_too_and_on_an_accelerator_once_its_work_is_done(wait, monkeypatch):
    """That every moment belongs to the innermost phase is seen in runs: `tests/callbacks/test_step_timer.py`."""
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: waited.append(device) or wait(3))
    clock = PhaseClock()
    with pytest.raises(KeyboardInterrupt), clock.phase("generate"):
        wait(1)
        raise KeyboardInterrupt
    wait(2)
    assert clock.seconds() == {"other": 2, "generate": 1}, "the running phase counts"
    assert not waited, "the CPU has nothing to wait for"
    clock.restart("other", torch.device("cuda", 1))
    with clock.phase("generate"):
        pass
    clock.switch("update")
    clock.switch("other")
    clock.switch("update")
    clock.switch("other", synchronize=True)
    assert clock.seconds() == {"other": 0, "generate": 3, "update": 3}, "the wait belongs to the phase that had the work"
    assert waited == [clock.device] * 2


@given(st.lists(st.tuples(st.floats(0, 1e4), st.integers(1, 9), st.integers(0, 12)), min_size=1, max_size=6))
def test_the_shares_add_up_to_what_was_put_in(rollouts):
    amortized, dealt = Amortized(), 0.0
    for amount, steps, taken in rollouts:
        amortized.put({"generate": amount}, steps)
        dealt += sum(amortized.take()["generate"] for _ in range(taken))
    dealt += sum(amortized.take()["generate"] for _ in range(amortized.steps))
    assert dealt == pytest.approx(sum(amount for amount, _, _ in rollouts))
