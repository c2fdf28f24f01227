"""Workers that take turns: what must be equal on both sides, and the summary of their steps."""

import pytest

from benchmarks import pairs
from benchmarks.commands import BenchmarkError
from benchmarks.workloads import Workload

SIZES = {"prompts": 2, "samples": 2, "max_new_tokens": 5, "mean_tokens": 5}


def test_sides_that_do_not_do_the_same_are_not_compared():
    for lengths in ([5] * 3, [5, 5, 5, 4]):
        with pytest.raises(BenchmarkError, match="where 4 of 5 to 5 are wanted"):
            pairs.check_lengths(Workload("main", **SIZES), "ours", lengths)
    facts = {"trainable_parameters": 5, "prompt_digest": 6, "threads": 1, "device": "cpu"}
    for name in pairs.SAME:
        with pytest.raises(BenchmarkError, match=f"{name} differs"):
            pairs.check_equal({"trl": facts, "ours": {**facts, name: 0}})


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("import sys; sys.exit('no room')", "the ours side ended too early: no room"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "it was killed by signal 9"),
        ("print('{}', flush=True); input(); print('{\"lengths\": [5]}', flush=True)", "made 1 completions"),
    ],
)
def test_a_worker_that_fails_is_said_with_its_last_line(tmp_path, script, expected):
    plan = pairs.Plan(1, "cpu", 1, 0, ("ours",), tmp_path, workers={"ours": ("-c", script)}, same=())
    with pytest.raises(BenchmarkError, match=expected):
        pairs.compare(Workload("main", **SIZES), tmp_path, plan)
