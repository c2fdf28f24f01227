"""A rollout in progress: the part that is made elsewhere, the part that the caller computes, and the state after a stop."""

import threading
from contextlib import contextmanager

import pytest

from hybrid_lightning.errors import RolloutError
from hybrid_lightning.rollout.future import RolloutFuture, in_thread
from hybrid_lightning.shared.stopping import RunStopped


def test_the_thread_that_asks_computes_once_what_a_thread_has_begun():
    may_end, calls, where = threading.Event(), [], []

    @contextmanager
    def noted():
        where.append("in")
        yield
        where.append("out")

    work = in_thread(lambda: may_end.wait(10) and 3, "a test")
    made = RolloutFuture(work.result, work, on_wait=may_end.set).within(noted)
    doubled = made.then(lambda value: calls.append(threading.current_thread()) or 2 * value)
    assert not doubled.done() and not where
    doubled.wait()
    assert doubled.done() and doubled.waited_s > 0.05 and where == ["in", "out"] and not calls
    assert doubled.result() == doubled.result() == 6
    assert calls == [threading.current_thread()] and where == ["in", "out"] * 2


def test_what_is_computed_here_is_not_waited_for_and_has_no_context_but_in_its_computation():
    entered = []
    lazy = RolloutFuture(lambda: [1]).within(contextmanager(lambda: iter([entered.append(True)])))
    lazy.wait()
    assert lazy.done() and not entered
    assert lazy.then(len).result() == 1 and entered == [True]


@pytest.mark.parametrize("failure", [RolloutError("no server answers"), RunStopped(15), KeyboardInterrupt()])
def test_a_failure_cancels_all_that_was_begun_and_is_raised_again(failure):
    ended, never = [], threading.Event()

    def fails():
        never.set()
        raise failure

    work = in_thread(lambda: never.wait(10), "a test")
    made = RolloutFuture(work.result, work, on_wait=fails, on_cancel=lambda: ended.append("servers"))
    scored = made.then(lambda _: None, on_cancel=lambda: ended.append("rewards"))
    with pytest.raises(type(failure)):
        scored.wait()
    assert ended == ["servers", "rewards"] and scored.done() and made.done()
    with pytest.raises(RolloutError if isinstance(failure, KeyboardInterrupt) else type(failure)):
        scored.result()
    assert not scored.cancel() or ended == ["servers", "rewards"], "once"
