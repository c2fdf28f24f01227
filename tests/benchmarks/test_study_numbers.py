"""What the study makes of its records."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="the study's intervals need scipy")

from benchmarks.study import score_tables, tables, tuning
from benchmarks.study.comparison import UNSEEN, compare, over_tasks
from benchmarks.study.equal_cost import equal_memory, equal_time
from benchmarks.study.estimates import correlation, difference, gap_closed, mean, ratio
from benchmarks.study.methods import CORE, METHODS
from benchmarks.study.ranks import rank_of
from benchmarks.study.records import TUNING_SEEDS, Job, Record, load, of_method, save

ROOT = Path(__file__).parents[2]


def record(method="lora", rate=1e-2, seed=0, purpose="run", accuracy=0.5, validation=None, trainable=100, rank=None):
    job = Job("tasks/sums.yaml", method, rate, seed, purpose, rank)
    points = [{"step": 0, "seconds": 0.0, "avg": 0.1, "greedy": 0.1}]
    points.append({"step": 60, "seconds": 5.0, "avg": accuracy if validation is None else validation, "greedy": accuracy})
    return job, Record(
        job=vars(job),
        options={"adapter.rank": rank or 2},
        config_digest="0",
        model_digest="0",
        commit="abc",
        versions={},
        curve=points,
        test={"avg": accuracy, "greedy": accuracy},
        trainable_parameters=trainable,
    )


def keep(results, *records):
    for job, made in records:
        save(made, job.path(results))


def test_a_record_comes_back_as_it_was_saved(tmp_path):
    job, made = record(method="only:model.layers.0.mlp.up_proj")
    save(made, job.path(tmp_path))
    assert load(job.path(tmp_path)) == made
    assert of_method(tmp_path, "run", "sums", "only:model.layers.0.mlp.up_proj") == [made]
    assert not list(tmp_path.rglob("*.part"))


def test_the_interval_of_a_mean_is_students():
    estimate = mean([1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * math.sqrt(5 / 3) / 2  # t at 97.5% with 3 degrees of freedom
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((2.5, 2.5 - half, 2.5 + half), rel=1e-6)
    assert math.isnan(mean([1.0]).low)


def test_a_difference_is_over_the_seeds_that_both_have():
    estimate = difference({0: 0.5, 1: 0.7, 9: 0.0}, {0: 0.4, 1: 0.5, 8: 1.0})
    assert estimate is not None
    assert estimate.value == pytest.approx(0.15) and estimate.number == 2
    assert difference({0: 1.0}, {1: 1.0}) is None


def test_the_share_of_a_gap_and_its_interval():
    low, high = {s: 0.2 + 0.01 * s for s in range(8)}, {s: 0.6 + 0.01 * s for s in range(8)}
    half_way = {s: 0.4 + 0.01 * s for s in range(8)}
    estimate = gap_closed(half_way, low, high)
    assert estimate is not None
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.5, 0.5, 0.5))
    noisy = gap_closed({**half_way, 0: 0.9}, low, high)
    assert noisy is not None and noisy.low < noisy.value < noisy.high
    none = gap_closed(low, low, low)
    assert none is not None and none.text() == "-"


def test_the_interval_of_a_ratio_holds_what_the_t_test_allows_and_no_more():
    parts, wholes = [3.0, 5.0, 4.0, 6.0, 2.0], [8.0, 7.0, 9.0, 8.5, 6.0]
    estimate = ratio(parts, wholes)
    assert estimate.value == pytest.approx(4 / 7.7)
    for end, inside in ((estimate.low, 1e-6), (estimate.high, -1e-6)):
        nearer, farther = (mean([p - q * w for p, w in zip(parts, wholes, strict=True)]) for q in (end + inside, end - inside))
        assert nearer.low < 0 < nearer.high and not farther.low < 0 < farther.high
    without_end = ratio(parts, [-9.0, 9.0, 1.0, -8.0, 8.0])
    assert without_end.text() == "2000.0 [-inf, inf]"


def test_rank_correlation_sees_order_alone():
    assert correlation([1, 2, 3, 4, 5, 6], [1, 4, 9, 16, 25, 36]).value == pytest.approx(1)
    assert correlation([1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]).value == pytest.approx(-1)


def test_tuning_starts_at_the_rates_of_the_task():
    rl = {"model": {"lr_full": 1e-5, "lr_lora": 3e-4}}
    assert tuning.first_rates(METHODS["fft"], rl) == [5e-6, 1e-5, 2e-5]
    assert tuning.first_rates(METHODS["hybrid"], rl) == [1.5e-4, 3e-4, 6e-4]
    supervised = {"model": {"class_path": "SupervisedModule", "init_args": {"lr_lora": 2e-3}}}
    assert tuning.first_rates(METHODS["lora"], supervised) == [1e-3, 2e-3, 4e-3]
    assert tuning.first_rates(METHODS["fft"], supervised) == [5e-6, 1e-5, 2e-5]  # what the module takes when nothing is said


def test_tuning_tries_the_first_rates_then_goes_beyond_a_best_edge():
    first = [2.5e-3, 5e-3, 1e-2]
    assert tuning.next_rates(first, {}) == first
    assert tuning.next_rates(first, {5e-3: 0.1}) == [2.5e-3, 1e-2]
    tuned = dict(zip(first, (0.1, 0.2, 0.3), strict=True))
    assert tuning.next_rates(first, tuned) == [0.02]
    assert tuning.next_rates(first, {**tuned, 0.02: 0.25}) == []
    assert tuning.next_rates(first, dict(zip(first, (0.3, 0.2, 0.1), strict=True))) == [0.00125]
    assert tuning.next_rates(first, dict(zip(first, (0.2, 0.3, 0.3), strict=True))) == [0.02]  # as good as its neighbour
    rising = {rate: n for n, rate in enumerate((*first, 0.02, 0.04, 0.08, 0.16))}
    assert tuning.next_rates(first, rising) == []  # not for ever
    assert tuning.outcome(rising).endswith(", at the edge of the 7 tried")
    assert tuning.outcome({**tuned, 0.02: 0.25}) == "best learning rate 0.01, validation 0.300"


def test_a_rate_counts_when_all_tuning_seeds_have_it(tmp_path):
    first, second = TUNING_SEEDS
    keep(
        tmp_path, record(rate=0.01, seed=first, purpose="sweep", validation=0.2), record(rate=0.01, seed=second, purpose="sweep")
    )
    keep(tmp_path, record(rate=0.02, seed=first, purpose="sweep"))
    assert tuning.means(of_method(tmp_path, "sweep", "sums", "lora")) == {0.01: pytest.approx(0.35)}
    with pytest.raises(SystemExit, match="sweep --task sums"):
        tuning.best_rate(tmp_path, "sums", METHODS["lora"])


def test_matched_lora_trains_as_much_as_the_hybrid(tmp_path):
    keep(tmp_path, record("hybrid", purpose="sweep", trainable=1010), record("lora", purpose="sweep", trainable=200, rank=2))
    assert rank_of(METHODS["lora_matched"], tmp_path, "sums") == 11
    assert rank_of(METHODS["lora"], tmp_path, "sums") is None


def test_equal_time_is_read_off_the_curve_where_a_slower_method_would_be(tmp_path):
    keep(tmp_path, *(record(name, seed=s, accuracy=0.5) for name in ("lora", "hybrid", "fft") for s in range(2)))
    (tmp_path / "cost").mkdir()
    rounds = {
        "lora": [{"seconds_per_step": 1.0, "scoring_seconds": 0.0}],
        "fft": [{"seconds_per_step": 0.5, "scoring_seconds": 0.0}],
    }
    rounds["hybrid"] = [{"seconds_per_step": step, "scoring_seconds": 30.0} for step in (0.9, 1.0, 9.0)]
    (tmp_path / "cost" / "sums.json").write_text(json.dumps({"rounds": rounds}))
    table = equal_time(tmp_path, compare(tmp_path, "sums"))
    # LoRA takes 60 s; the hybrid is half way then, between 10% and 50%, and FFT ended before.
    assert table.splitlines()[0].endswith("after 60.0 s |")
    assert "| hybrid | 1000 | 30.0 [30.0, 30.0] |" in table and "| fft | 500 | 50.0 [50.0, 50.0] |" in table
    assert equal_time(tmp_path / "none", compare(tmp_path, "sums")) == ""


def test_equal_memory_names_the_best_method_that_trains_no_more(tmp_path):
    for name, trainable, accuracy in (
        ("lora", 2**16, 0.5),
        ("lora_matched", 2**17, 0.7),
        ("hybrid", 2**17, 0.6),
        ("fft", 2**20, 0.6),
    ):
        keep(tmp_path, *(record(name, seed=s, accuracy=accuracy, trainable=trainable) for s in range(2)))
    best = {line.split(" | ")[0].strip("| "): line for line in equal_memory(compare(tmp_path, "sums")).splitlines()}
    assert best["lora"].endswith("| lora, 50.0 [50.0, 50.0] |") and "| 1.00 |" in best["lora"]
    assert best["hybrid"].endswith("| lora_matched, 70.0 [70.0, 70.0] |") and best["fft"].endswith(
        "| lora_matched, 70.0 [70.0, 70.0] |"
    )


def results_with_a_gap(folder, seeds=8):
    means = {"fft": 0.8, "lora": 0.5, "dora": 0.51, "rslora": 0.49, "adalora": 0.4, "hybrid": 0.78, "random": 0.6}
    for place, (name, value) in enumerate(means.items()):
        keep(folder, *(record(name, seed=s, accuracy=value + 0.002 * ((s * 5 + place) % seeds)) for s in range(seeds)))


def test_a_comparison_by_hand(tmp_path):
    results_with_a_gap(tmp_path)
    comparison = compare(tmp_path, "sums")
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
    gain = compare(tmp_path, "sums").relative_gain()
    keep(tmp_path, *(record("hybrid", seed=s, accuracy=0.99) for s in range(20, 28)))
    assert compare(tmp_path, "sums").rows["hybrid"].accuracy.number > 8
    assert compare(tmp_path, "sums").relative_gain() == pytest.approx(gain)


def test_what_is_not_reached_is_said(tmp_path):
    results_with_a_gap(tmp_path)
    comparison = compare(tmp_path, "sums")
    weak = {**comparison.rows, "hybrid": replace(comparison.rows["random"], over_random=mean([0.0, 0.0]))}
    assert tables.targets([replace(comparison, rows=weak)]).count("**no**") == 3  # the gap, and twice the random choice itself


def test_the_ratio_of_a_task_is_that_of_the_better_tuning(tmp_path):
    results_with_a_gap(tmp_path)
    keep(tmp_path, *(record("hybrid_one_rate", seed=s, accuracy=0.7) for s in range(8)))  # which the test problems like less
    for name, validation in (("hybrid", 0.5), ("hybrid_one_rate", 0.6)):
        keep(tmp_path, *(record(name, seed=s, purpose="sweep", validation=validation) for s in TUNING_SEEDS))
    rows = compare(tmp_path, "sums").rows
    assert rows["hybrid_tuned_ratio"].accuracy.value == pytest.approx(0.7) and rows["hybrid_tuned_ratio"].group == "hybrid"
    assert "random_tuned_ratio" not in rows  # it was tuned by one ratio alone
    lines = tables.ratios([compare(tmp_path, "sums")]).splitlines()[2:]
    assert [line.split(" | ")[:2] for line in lines] == [["| 0.3", "sums"], ["| 0.3", "mean of these"]]


def test_one_tuning_seed_is_enough_where_all_rates_have_it(tmp_path):
    for rate, value in ((1e-3, 0.1), (2e-3, 0.3), (4e-3, 0.2)):
        keep(tmp_path, record("hybrid", rate, TUNING_SEEDS[0], "sweep", validation=value))
    assert tuning.best_rate(tmp_path, "sums", METHODS["hybrid"]) == 2e-3
    assert tuning.means(of_method(tmp_path, "sweep", "sums", "hybrid"), TUNING_SEEDS) == {}  # which a sweep by both goes on from
    assert tuning.best_rate(tmp_path, "sums", METHODS["start"]) == 0.0


def test_choices_are_ranked_by_what_they_gain_where_there_is_a_gap(tmp_path):
    results_with_a_gap(tmp_path)
    keep(tmp_path, *(record("late", seed=s, accuracy=0.9) for s in range(8)))
    keep(tmp_path, *(record("budget_20", seed=s, accuracy=0.95) for s in range(8)))
    lines = tables.choices([compare(tmp_path, "sums")]).splitlines()[2:]
    assert [line.split(" | ")[0].strip("| ") for line in lines] == ["late", "hybrid", "random"]
    assert lines[0].startswith("| late | 39.3 [") and "| 29.3 [" in lines[0]  # LoRA has 50.7 on average
    assert lines[0].endswith("| 1.00 |")


def test_choices_say_whether_they_gain_by_what_they_train(tmp_path):
    results_with_a_gap(tmp_path)
    for place, name in enumerate(("late", "early", "largest", "probe")):
        keep(tmp_path, *(record(name, seed=s, accuracy=0.9 + 0.02 * place, trainable=200 + 100 * place) for s in range(8)))
    table, _, said = tables.choices([compare(tmp_path, "sums")]).rpartition("\n\n")
    # Hybrid and random train alike, so that two of the six ranks are one.
    assert said.startswith("Rank correlation") and ": 0.99 [" in said
    assert {line.split(" | ")[0]: line.split(" | ")[-1] for line in table.splitlines()}["| late"] == "2.00 |"


def test_differences_over_tasks_are_of_seeds_that_all_have(tmp_path):
    for task, gains in (("one", {0: 0.1, 1: 0.2, 2: 0.9}), ("two", {0: 0.3, 1: 0.0})):
        for seed, gain in gains.items():
            keep(tmp_path / task, record("hybrid", seed=seed, accuracy=0.4 + gain), record("lora", seed=seed, accuracy=0.4))
    estimate = over_tasks([compare(tmp_path / task, "sums") for task in ("one", "two")], "hybrid", "lora")
    assert estimate is not None and estimate.number == 2 and estimate.value == pytest.approx(0.15)
    assert over_tasks([compare(tmp_path / "one", "sums")], "hybrid", "random") is None


def test_scores_beside_the_oracle(tmp_path):
    modules = [f"model.layers.{n}.mlp.up_proj" for n in range(10)]
    for n, module in enumerate(modules):
        keep(tmp_path, *(record(f"only:{module}", seed=s, accuracy=0.3 + 0.02 * n) for s in range(2)))
    for seed in range(2):
        path = tmp_path / "scores" / "sums" / "PreconditionedTail" / f"seed={seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        scores = ", ".join(f'"{module}": {n + seed}' for n, module in enumerate(modules))
        path.write_text(f'{{"scores": {{{scores}}}}}')
    text = score_tables.of_task(tmp_path, "sums")
    assert "| PreconditionedTail | 1.00 [1.00, 1.00] | - | 1.00 | 9.mlp.up_proj |" in text


def test_the_analysis_makes_pages_of_records_alone(tmp_path):
    results_with_a_gap(tmp_path / "results")
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- study: headline -->\nold\n<!-- end -->\nbetween\n<!-- study: targets -->\n<!-- end -->\nafter\n"
    )
    command = (sys.executable, "-m", "benchmarks.study.analyse", "--results", tmp_path / "results", "--pages", page)
    for _ in range(2):  # again changes nothing
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    text = page.read_text()
    assert "old" not in text and text.startswith("before\n") and text.endswith("after\n")
    assert text.count("| sums | ") == 1 and text.count("closes 90%") == 1
    written = {path.name for path in (tmp_path / "results").iterdir()}
    assert {"tables.md", "accuracy.png", "curves.png", "sizes.png"} <= written


def test_a_stage_without_what_it_needs_says_so(tmp_path):
    for stage, options, words in (
        ("run", ["--task", "products"], "has no tuned learning rate"),
        ("analyse", [], "no runs in"),
        ("oracle", ["--task", "products"], "sweep fft on products first"),
    ):
        command = (sys.executable, "-m", f"benchmarks.study.{stage}", "--results", tmp_path, *options)
        failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert failed.returncode == 1 and words in failed.stderr and "Traceback" not in failed.stderr


def test_a_method_is_judged_at_its_tuned_rate_alone(tmp_path):
    for rate, validation in ((1e-2, 0.6), (2e-2, 0.5)):
        keep(tmp_path, *(record("probe", rate, seed=s, accuracy=0.1 if rate == 2e-2 else 0.7) for s in range(8)))
        keep(tmp_path, *(record("probe", rate, s, "sweep", validation=validation) for s in TUNING_SEEDS))
    row = compare(tmp_path, "sums").rows["probe"]
    assert row.learning_rate == 1e-2 and row.accuracy.number == 8 and row.accuracy.value == pytest.approx(0.7)


def test_runs_of_unseen_seeds_can_be_compared_alone(tmp_path):
    results_with_a_gap(tmp_path)
    for place, (name, value) in enumerate({"hybrid": 0.8, "random": 0.7, "random_mlp": 0.75, "lora": 0.5}.items()):
        keep(tmp_path, *(record(name, seed=UNSEEN + s, accuracy=value + 0.01 * ((s + place) % 3)) for s in range(3)))
    comparison = compare(tmp_path, "sums", UNSEEN)
    assert {name: row.accuracy.number for name, row in comparison.rows.items() if name != "start"} == dict.fromkeys(
        ("lora", "hybrid", "random", "random_mlp"), 3
    )
    lines = {line.split(" | ")[0]: line for line in tables.differences([comparison]).splitlines()[2:]}
    assert set(lines) == {
        f"| {pair}" for pair in ("hybrid less lora", "hybrid less random", "hybrid less random_mlp", "random_mlp less random")
    }
    assert "| hybrid less random_mlp | 5.0 [" in lines["| hybrid less random_mlp"]


def test_the_core_is_there_and_what_chooses_differs_in_that_alone():
    assert set(CORE) <= METHODS.keys()
    choices = {name for name, method in METHODS.items() if method.chooses}
    assert {"random", "bottom", "probe", "largest"} <= choices
    assert not choices & {"hybrid", "random_one_rate", "only_full", "budget_20", "lora"}
