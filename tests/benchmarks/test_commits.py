"""The comparison of two checkouts: what it refuses, and its table."""

import pytest
from benchmark_modules import FOLDER, commits, fork_workers


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere is no checkout of this project: make one by git worktree add nowhere COMMIT"),
        ([str(FOLDER.parent), "--pairs", "0"], "--pairs must be at least 1, got 0"),
    ],
)
def test_what_cannot_work_is_refused(capsys, arguments, said):
    assert commits.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_the_table_has_medians_and_the_ratio_of_neighbouring_steps(monkeypatch, capsys):
    """With measurements that are given; `benchmarks/pairs.py` makes them as for the comparison with TRL."""
    times = {"before": [9.0, 1.0, 2.0, 4.0], "now": [9.0, 1.1, 2.0, 5.0]}  # the first is not counted
    steps = {side: [{"seconds": value, "processor_seconds": 2 * value} for value in values] for side, values in times.items()}
    monkeypatch.setattr(commits, "compare", lambda workload, prepared, plan, say: {"steps": steps})
    fork_workers(monkeypatch)
    assert commits.main([str(FOLDER.parent), "--workload", "tiny"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows[0].startswith("| `tiny` | seconds | 2.000 | 2.000 | 1.100 (")
    assert rows[1].startswith("| `tiny` | processor seconds | 4.000 | 4.000 | 1.100 (")
