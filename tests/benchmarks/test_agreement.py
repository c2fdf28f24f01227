"""The comparison of sampling and training log-probabilities, on the embedded policy."""

from dataclasses import replace

import pytest

from benchmarks.speed import agreement
from benchmarks.workloads import WORKLOADS


@pytest.mark.usefixtures("forked")
def test_float32_agrees_and_the_table_says_how_far(monkeypatch, capsys):
    monkeypatch.setitem(WORKLOADS, "tiny", replace(WORKLOADS["tiny"], prompts=8))
    assert agreement.main(["--workload", "tiny", "--steps", "1"]) == 0
    name, dtype, tokens, mean, *shares, largest = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert (name, dtype) == ("`tiny`", "float32") and int(tokens) > 300
    assert 0 < float(mean) < float(largest) < 1e-4
    assert sorted(map(float, shares)) == [float(share) for share in shares] and len(shares) == 4
