"""The study's pages and figures, made of records alone."""

import sys
from pathlib import Path

import pytest
from study_records import results_with_a_gap

from benchmarks.study import analyse, frontier, run
from benchmarks.study.store import FOLDER, PACK, RESULTS, Store

ROOT = Path(__file__).parents[2]


def test_the_tables_of_the_projects_pages_are_those_that_its_records_give():
    store = Store(ROOT / "none", ROOT / RESULTS / PACK)
    tables = analyse.tables_of(store, *analyse.found(store))
    marked = 0
    for page in analyse.PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert analyse.filled(text, tables) == text, f"{page} has other numbers: python -m benchmarks.study.analyse"
        marked += sum(f"<!-- study: {name} -->" in text for name in tables)
        assert text.count("<!-- study: ") == sum(f"<!-- study: {name} -->" in text for name in tables), "a mark of no table"
    assert marked >= 8


def test_the_analysis_makes_pages_of_records_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    results_with_a_gap(Path("mine"))
    page = Path("results/README.md")
    page.parent.mkdir()
    before = "before\n<!-- study: headline -->\nold\n<!-- end -->\nbetween\n<!-- study: targets -->\n<!-- end -->\nafter\n"
    page.write_text(before)

    def analysed(*options):
        monkeypatch.setattr(sys, "argv", ["analyse", *options])
        analyse.main()
        return page.read_text(), capsys.readouterr().out

    own = ("--records", "mine", "--results", "mine")
    left, made = analysed(*own)
    assert left == before, "records of one's own leave the project's pages alone"
    assert "| sums |" in made and "## Differences" in made and "on no task" not in made
    text, _ = analysed(*own, "--pages", "results/README.md")
    assert "old" not in text and text.startswith("before\n") and text.endswith("after\n")
    assert text.count("| sums | ") == 1 and text.count("closes 90%") == 1
    assert "accuracy.png" in {path.name for path in Path("mine").iterdir()}
    page.write_text(before)
    FOLDER.parent.mkdir(parents=True)
    Path("mine").rename(FOLDER)
    assert analysed() == analysed() == (text, made), "the project's own records fill its pages, and again change nothing"
    assert (RESULTS / "accuracy.png").exists()


@pytest.mark.parametrize(
    ("stage", "options", "words"),
    [
        (run, ["--task", str(ROOT / "configs/gspo.yaml")], "configs/gspo.yaml --method"),
        (analyse, [], "there are no runs in"),
        (run, ["--method", "nothing"], "unknown method nothing; choose among start, "),
        (frontier, ["--seeds", "1000"], "by which learning rates are tuned"),
        (run, ["--task", str(ROOT / "benchmarks/study/tasks/facts.yaml")], "is missing: run python -m benchmarks.study.pretrain"),
    ],
)
def test_a_stage_without_what_it_needs_says_so(stage, options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [stage.__name__, "--records", str(tmp_path), "--results", str(tmp_path), *options])
    with pytest.raises(SystemExit) as stopped:
        stage.main()
    assert isinstance(stopped.value.code, str) and words in stopped.value.code, "which Python prints, and ends with 1"
