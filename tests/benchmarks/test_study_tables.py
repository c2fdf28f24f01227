"""What the study makes of its records: comparisons and tables."""

import sys
from dataclasses import replace
from pathlib import Path

import fork_server
import pytest

pytest.importorskip("scipy", reason="the study's intervals need scipy: pip install 'hybrid-lightning[study]'")

from study_records import keep, record, results_with_a_gap

from benchmarks.study import analyse, oracle, run, score_tables, tables
from benchmarks.study.comparison import UNSEEN, compare, over_tasks
from benchmarks.study.equal_cost import equal_memory, equal_time
from benchmarks.study.estimates import mean
from benchmarks.study.records import TUNING_SEEDS
from benchmarks.study.store import FOLDER, RESULTS, Store

ROOT = Path(__file__).parents[2]


def test_equal_time_is_read_off_the_curve_where_a_slower_method_would_be(tmp_path):
    seconds = {"lora": (60.0, 50.0, 600.0), "hybrid": (80.0, 75.0, 800.0), "fft": (30.0, 25.0, 250.0)}
    for name, each in seconds.items():
        for seed, taken in enumerate(each):
            job, made = record(name, seed=seed, accuracy=0.5)
            keep(tmp_path, (job, replace(made, processor_seconds=taken)))
    # Neither a run that was cut short nor one made at another time says what the hybrid takes, nor does one without LoRA's.
    for seed, change in ((3, {"diverged": True}), (4, {"commit": "other"}), (5, {})):
        if seed < 5:
            keep(tmp_path, record("lora", seed=seed, accuracy=0.5))
        job, made = record("hybrid", seed=seed, accuracy=0.5)
        keep(tmp_path, (job, replace(made, processor_seconds=1.0, **change)))
    job, made = record("dora", seed=0, accuracy=0.5)
    keep(tmp_path, (job, replace(made, commit="other")))
    lines = equal_time(compare(Store(tmp_path), "sums")).splitlines()[2:]
    # The hybrid is at 45 of 60 steps when LoRA ends, between 10% and 50%, and FFT is done.
    assert lines == [
        "| fft | 3 | 0.50 [0.42, 0.50] | 50.0 [50.0, 50.0] |",
        "| lora | 3 | 1.00 [1.00, 1.00] | 50.0 [50.0, 50.0] |",
        "| hybrid | 3 | 1.33 [1.33, 1.50] | 40.0 [40.0, 40.0] |",
    ]


def test_equal_time_says_nothing_where_only_lora_is_known_or_not_even_lora(tmp_path):
    keep(tmp_path, *(record("lora", seed=seed) for seed in range(2)))
    assert equal_time(compare(Store(tmp_path), "sums")) == ""
    keep(tmp_path / "other", *(record("fft", seed=seed) for seed in range(2)))
    assert equal_time(compare(Store(tmp_path / "other"), "sums")) == ""


def test_equal_memory_names_the_best_method_that_trains_no_more(tmp_path):
    for name, trainable, accuracy in (
        ("lora", 2**16, 0.5),
        ("lora_matched", 2**17, 0.7),
        ("hybrid", 2**17, 0.6),
        ("fft", 2**20, 0.6),
    ):
        keep(tmp_path, *(record(name, seed=s, accuracy=accuracy, trainable=trainable) for s in range(2)))
    best = {line.split(" | ")[0].strip("| "): line for line in equal_memory(compare(Store(tmp_path), "sums")).splitlines()}
    assert best["lora"].endswith("| lora, 50.0 [50.0, 50.0] |") and "| 1.00 |" in best["lora"]
    assert best["hybrid"].endswith("| lora_matched, 70.0 [70.0, 70.0] |") and best["fft"].endswith(
        "| lora_matched, 70.0 [70.0, 70.0] |"
    )


def test_a_comparison_by_hand(tmp_path):
    results_with_a_gap(tmp_path)
    comparison = compare(Store(tmp_path), "sums")
    assert comparison.has_gap
    hybrid, lora, fft = (comparison.rows[name] for name in ("hybrid", "lora", "fft"))
    assert hybrid.accuracy.value == pytest.approx(0.787) and hybrid.over_lora is not None
    assert hybrid.over_lora.value == pytest.approx(hybrid.accuracy.value - lora.accuracy.value)
    assert hybrid.gap is not None
    assert hybrid.gap.value == pytest.approx(hybrid.over_lora.value / (fft.accuracy.value - lora.accuracy.value))
    assert comparison.best_baseline is comparison.rows["dora"]
    assert comparison.relative_gain() == pytest.approx(0.787 / 0.517 - 1)
    text = tables.targets([comparison])
    assert "closes 90% of the gap on sums | 93 [" in text and "+52.2%" in text and "**no**" not in text


def test_seeds_that_the_best_baseline_lacks_change_no_gain_over_it(tmp_path):
    results_with_a_gap(tmp_path)
    gain = compare(Store(tmp_path), "sums").relative_gain()
    keep(tmp_path, *(record("hybrid", seed=s, accuracy=0.99) for s in range(20, 28)))
    assert compare(Store(tmp_path), "sums").rows["hybrid"].accuracy.number > 8
    assert compare(Store(tmp_path), "sums").relative_gain() == pytest.approx(gain)


def test_what_is_not_reached_is_said(tmp_path):
    results_with_a_gap(tmp_path)
    comparison = compare(Store(tmp_path), "sums")
    weak = {**comparison.rows, "hybrid": replace(comparison.rows["random"], over_random=mean([0.0, 0.0]))}
    assert tables.targets([replace(comparison, rows=weak)]).count("**no**") == 3  # the gap, and twice the random choice itself


def test_the_ratio_of_a_task_is_that_of_the_better_tuning(tmp_path):
    results_with_a_gap(tmp_path)
    keep(tmp_path, *(record("hybrid_one_rate", seed=s, accuracy=0.7) for s in range(8)))  # which the test problems like less
    for name, validation in (("hybrid", 0.5), ("hybrid_one_rate", 0.6)):
        keep(tmp_path, *(record(name, seed=s, purpose="sweep", validation=validation) for s in TUNING_SEEDS))
    rows = compare(Store(tmp_path), "sums").rows
    assert rows["hybrid_tuned_ratio"].accuracy.value == pytest.approx(0.7) and rows["hybrid_tuned_ratio"].group == "hybrid"
    assert "random_tuned_ratio" not in rows  # it was tuned by one ratio alone
    lines = tables.ratios([compare(Store(tmp_path), "sums")]).splitlines()[2:]
    assert [line.split(" | ")[:2] for line in lines] == [["| 0.3", "sums"], ["| 0.3", "mean of these"]]


def test_choices_are_ranked_by_what_they_gain_where_there_is_a_gap(tmp_path):
    results_with_a_gap(tmp_path)
    keep(tmp_path, *(record("late", seed=s, accuracy=0.9) for s in range(8)))
    keep(tmp_path, *(record("budget_20", seed=s, accuracy=0.95) for s in range(8)))
    lines = tables.choices([compare(Store(tmp_path), "sums")]).splitlines()[2:]
    assert [line.split(" | ")[0].strip("| ") for line in lines] == ["late", "hybrid", "random"]
    assert lines[0].startswith("| late | 39.3 [") and "| 29.3 [" in lines[0]  # LoRA has 50.7 on average
    assert lines[0].endswith("| 1.00 |")


def test_choices_say_whether_they_gain_by_what_they_train(tmp_path):
    results_with_a_gap(tmp_path)
    for place, name in enumerate(("late", "early", "largest", "probe")):
        keep(tmp_path, *(record(name, seed=s, accuracy=0.9 + 0.02 * place, trainable=200 + 100 * place) for s in range(8)))
    table, _, said = tables.choices([compare(Store(tmp_path), "sums")]).rpartition("\n\n")
    # Hybrid and random train alike, so that two of the six ranks are one.
    assert said.startswith("Rank correlation") and ": 0.99 [" in said
    assert {line.split(" | ")[0]: line.split(" | ")[-1] for line in table.splitlines()}["| late"] == "2.00 |"


def test_differences_over_tasks_are_of_seeds_that_all_have(tmp_path):
    for task, gains in (("one", {0: 0.1, 1: 0.2, 2: 0.9}), ("two", {0: 0.3, 1: 0.0})):
        for seed, gain in gains.items():
            keep(tmp_path / task, record("hybrid", seed=seed, accuracy=0.4 + gain), record("lora", seed=seed, accuracy=0.4))
    estimate = over_tasks([compare(Store(tmp_path / task), "sums") for task in ("one", "two")], "hybrid", "lora")
    assert estimate is not None and estimate.number == 2 and estimate.value == pytest.approx(0.15)
    assert over_tasks([compare(Store(tmp_path / "one"), "sums")], "hybrid", "random") is None


def test_scores_beside_the_oracle(tmp_path):
    modules = [f"model.layers.{n}.mlp.up_proj" for n in range(10)]
    for n, module in enumerate(modules):
        keep(tmp_path, *(record(f"only:{module}", seed=s, accuracy=0.3 + 0.02 * n) for s in range(2)))
    for seed in range(2):
        path = tmp_path / "scores" / "sums" / "PreconditionedTail" / f"seed={seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        scores = ", ".join(f'"{module}": {n + seed}' for n, module in enumerate(modules))
        path.write_text(f'{{"scores": {{{scores}}}}}')
    text = score_tables.of_task(Store(tmp_path), "sums")
    assert "| PreconditionedTail | 1.00 [1.00, 1.00] | - | 1.00 | 9.mlp.up_proj |" in text
    assert text.endswith("The oracle has 2 seeds; its rank correlation between two halves of them is 1.00.")


def test_the_oracle_is_asked_whether_it_agrees_with_itself():
    up, down = ({f"module.{n}": slope * n for n in range(5)} for slope in (2.0, -1.0))
    # Each draw beside the mean of the other two: rising beside rising, twice, and falling beside rising.
    assert score_tables.halves([up, up, down]) == pytest.approx(1 / 3)
    assert score_tables.halves([up, up, down, down]) == pytest.approx((2 * -1 + 4 * 1) / 6)
    assert score_tables.halves([up]) is None and score_tables.halves([]) is None


def test_the_analysis_makes_pages_of_records_alone(tmp_path, monkeypatch):
    results_with_a_gap(tmp_path / "results")
    for method, size in (("lora_r4", 100), ("mlp_r4", 100), ("hybrid_10_r8_one_rate", 400), ("fft", 800)):
        job, made = record(method, purpose="frontier", trainable=size)
        job = replace(job, task="tasks/facts.yaml")
        keep(tmp_path / "results", (job, replace(made, job=vars(job))))
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- study: headline -->\nold\n<!-- end -->\nbetween\n<!-- study: targets -->\n<!-- end -->\n"
        "<!-- study: one_size -->\n<!-- end -->\nafter\n"
    )
    options = ("--records", str(tmp_path / "results"), "--results", str(tmp_path / "results"), "--pages", str(page))
    fork_server.run((sys.executable, "-m", "benchmarks.study.analyse", *options), cwd=ROOT, check=True, capture_output=True)
    text = page.read_text()
    monkeypatch.setattr(sys, "argv", ["analyse", *options])
    analyse.main()
    assert page.read_text() == text, "again changes nothing"
    assert "old" not in text and text.startswith("before\n") and text.endswith("after\n")
    assert text.count("| sums | ") == 1 and text.count("closes 90%") == 1
    assert text.count("| facts | 1 | 50 | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 |") == 1
    written = {path.name for path in (tmp_path / "results").iterdir()}
    assert {"tables.md", "accuracy.png", "curves.png", "sizes.png"} <= written


def test_records_of_ones_own_leave_the_projects_pages_alone(tmp_path, monkeypatch):
    results_with_a_gap(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    page, text = Path("README.md"), "<!-- study: headline -->\nold\n<!-- end -->\n"
    page.write_text(text)
    monkeypatch.setattr(sys, "argv", ["analyse", "--records", "mine", "--results", "mine"])
    analyse.main()
    assert page.read_text() == text and "| sums |" in (made := Path("mine/tables.md").read_text())
    assert "## Differences" in made and "on no task" not in made
    FOLDER.parent.mkdir(parents=True)
    Path("mine").rename(FOLDER)
    monkeypatch.setattr(sys, "argv", ["analyse"])
    analyse.main()
    assert "old" not in page.read_text() and "| sums |" in page.read_text()
    assert (RESULTS / "tables.md").read_text() == made


def test_tables_about_a_gap_are_left_out_where_there_is_none(tmp_path, monkeypatch):
    keep(tmp_path, *(record(name, seed=s) for name in ("lora", "fft", "hybrid", "random") for s in range(3)))
    monkeypatch.setattr(sys, "argv", ["analyse", "--records", str(tmp_path), "--results", str(tmp_path)])
    analyse.main()
    made = (tmp_path / "tables.md").read_text()
    assert "on no task" in made and "| hybrid | 3 | 0.01 |" in made
    assert "## Differences" not in made and "## Ratios" not in made and "## Targets" in made


@pytest.mark.parametrize(
    ("stage", "options", "words"),
    [
        (run, ["--task", "products"], "has no tuned learning rate"),
        (run, ["--task", "configs/gspo.yaml"], "sweep --task configs/gspo.yaml --method"),  # as a user has given it
        (analyse, [], "no runs in"),
        (oracle, ["--task", "products"], "sweep fft on products first"),
    ],
)
def test_a_stage_without_what_it_needs_says_so(stage, options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [stage.__name__, "--records", str(tmp_path), "--results", str(tmp_path), *options])
    with pytest.raises(SystemExit) as stopped:
        stage.main()
    assert isinstance(stopped.value.code, str) and words in stopped.value.code, "which Python prints, and ends with 1"


def test_a_method_is_judged_at_its_tuned_rate_alone(tmp_path):
    for rate, validation in ((1e-2, 0.6), (2e-2, 0.5)):
        keep(tmp_path, *(record("probe", rate, seed=s, accuracy=0.1 if rate == 2e-2 else 0.7) for s in range(8)))
        keep(tmp_path, *(record("probe", rate, s, "sweep", validation=validation) for s in TUNING_SEEDS))
    row = compare(Store(tmp_path), "sums").rows["probe"]
    assert row.learning_rate == 1e-2 and row.accuracy.number == 8 and row.accuracy.value == pytest.approx(0.7)


def test_runs_of_unseen_seeds_can_be_compared_alone(tmp_path):
    results_with_a_gap(tmp_path)
    for place, (name, value) in enumerate({"hybrid": 0.8, "random": 0.7, "random_mlp": 0.75, "lora": 0.5}.items()):
        keep(tmp_path, *(record(name, seed=UNSEEN + s, accuracy=value + 0.01 * ((s + place) % 3)) for s in range(3)))
    comparison = compare(Store(tmp_path), "sums", UNSEEN)
    assert {name: row.accuracy.number for name, row in comparison.rows.items() if name != "start"} == dict.fromkeys(
        ("lora", "hybrid", "random", "random_mlp"), 3
    )
    lines = {line.split(" | ")[0]: line for line in tables.differences([comparison]).splitlines()[2:]}
    assert set(lines) == {
        f"| {pair}" for pair in ("hybrid less lora", "hybrid less random", "hybrid less random_mlp", "random_mlp less random")
    }
    assert "| hybrid less random_mlp | 5.0 [" in lines["| hybrid less random_mlp"]
