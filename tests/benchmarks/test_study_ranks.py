import json
import sys

import pytest

pytest.importorskip("scipy")  # which the study needs

from benchmarks.commands import ROOT
from benchmarks.study import ranks

RUN = {
    "seed": 0,
    "loss": "GRPOLoss",
    "method": "lora",
    "scaling": "2",
    "rank": 4,
    "completions": 64,
    "rate": 0.01,
    "diverged": False,
}


@pytest.mark.parametrize(
    ("avg", "rewards", "expected"),
    [
        (0.9, [0.4, 0.9, 0.8], "learned"),
        (0.3, [0.4, 0.9, 0.3], "fell"),  # 35 points below the mean of 0.4 and 0.9
        (0.5, [0.4, 0.9, 0.4], "learned"),  # a single lucky rollout is not a peak
        (0.1, [0.4, 0.2, 0.1], "collapsed"),
    ],
)
def test_how_a_run_ended(avg, rewards, expected):
    assert ranks.outcome({**RUN, "avg": avg, "rewards": rewards}) == expected
    assert ranks.outcome({**RUN, "avg": avg, "rewards": rewards, "diverged": True}) == "collapsed"


def test_a_table_says_what_broke():
    grown, broken = [0.4, 0.9], [0.4, 0.1]
    runs = [{**RUN, "avg": 0.9, "rewards": grown}, {**RUN, "avg": 0.3, "rewards": grown}, {**RUN, "avg": 0.0, "rewards": broken}]
    runs += [{**run, "rank": 64, "avg": 0.0} for run in runs] + [{**RUN, "rate": 0.1, "avg": 0.0, "rewards": broken}]
    rows = ranks.by_rank(runs, ("rate", "completions"), ranks.accuracy).splitlines()
    assert rows[0] == "| rank | 0.01, 64 |", "without the rate at which all runs collapsed"
    assert rows[2:] == ["| 4 | 40.0±45.8cf |", "| 64 | ccc |"]


def test_the_page_has_the_tables_that_its_runs_give():
    page = (ROOT / "results" / "ranks.md").read_text(encoding="utf-8")
    made = ranks.tables(ranks.read(ROOT / ranks.OUT))
    shown = [title for title in made if title.startswith("GRPOLoss, lora") or title == "trial step"]
    assert len(shown) == 4
    for title in shown:
        assert made[title] in page, f"{title} has other numbers: python -m benchmarks.study.ranks --seed"


def test_a_run_is_made_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "ranks.jsonl"
    words = f"ranks --steps 2 --completions 64 --rank 2 --rate 0.003 --scaling 16/rank --doctor --out {out}".split()
    monkeypatch.setattr(sys, "argv", words)
    ranks.main()
    (line,) = out.read_text().splitlines()
    run = json.loads(line)
    assert run["trained"] == 20480 and len(run["rewards"]) == len(run["entropies"]) == 1 and 0 < run["avg"] < 1
    assert 0 < run["trial_kl"] < 10 and run["commit"]
    assert "GRPOLoss, lora, alpha=16" in capsys.readouterr().out
    ranks.main()
    assert out.read_text() == line + "\n"
