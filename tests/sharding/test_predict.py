"""Ranks predict every prompt once, also where one has more batches than another."""

import pytest
from ranks_of_tests import run
from runs_of_tests import predict
from test_equal_to_one_process import STRATEGIES


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp1"])
def test_every_prompt_is_predicted_once(folder, tmp_path, strategy):
    expected = {record["index"]: record["completions"] for record in predict(folder, tmp_path / "one")}
    assert len(expected) == 5, "three and two on two ranks: two batches and one"
    arguments = {"folder": folder, "root": tmp_path / "run", "strategy": STRATEGIES[strategy], "devices": 2}
    results = run(2, tmp_path / "ranks", predict, timeout_s=30, **arguments)
    found = [(record["index"], record["completions"]) for result in results for record in result]
    assert sorted(found) == sorted(expected.items())
