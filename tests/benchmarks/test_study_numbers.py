"""Estimates of the study, and the learning rates that it tunes."""

import math

import pytest

pytest.importorskip("scipy", reason="the study's intervals need scipy: pip install 'hybrid-lightning[study]'")

from study_records import keep, record

from benchmarks.study import tuning
from benchmarks.study.estimates import correlation, difference, gap_closed, mean, ratio
from benchmarks.study.methods import CORE, METHODS
from benchmarks.study.ranks import rank_of
from benchmarks.study.records import TUNING_SEEDS, load, of_method, save
from benchmarks.study.store import Store


def test_a_record_comes_back_as_it_was_saved(tmp_path):
    job, made = record(method="only:model.layers.0.mlp.up_proj")
    save(made, tmp_path / job.file)
    assert load(tmp_path / job.file) == made
    assert of_method(Store(tmp_path), "run", "sums", "only:model.layers.0.mlp.up_proj") == [made]
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
    with pytest.raises(SystemExit, match=r"has to name model\.lr_full, from which tuning starts"):
        tuning.first_rates(METHODS["fft"], supervised)  # the module's own would depend on the model


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
    assert tuning.means(of_method(Store(tmp_path), "sweep", "sums", "lora")) == {0.01: pytest.approx(0.35)}
    with pytest.raises(SystemExit, match="sweep --task sums"):
        tuning.best_rate(Store(tmp_path), "sums", METHODS["lora"])


def test_matched_lora_trains_as_much_as_the_hybrid(tmp_path):
    keep(tmp_path, record("hybrid", purpose="sweep", trainable=1010), record("lora", purpose="sweep", trainable=200, rank=2))
    assert rank_of(METHODS["lora_matched"], Store(tmp_path), "sums") == 11
    assert rank_of(METHODS["lora"], Store(tmp_path), "sums") is None


def test_one_tuning_seed_is_enough_where_all_rates_have_it(tmp_path):
    for rate, value in ((1e-3, 0.1), (2e-3, 0.3), (4e-3, 0.2)):
        keep(tmp_path, record("hybrid", rate, TUNING_SEEDS[0], "sweep", validation=value))
    assert tuning.best_rate(Store(tmp_path), "sums", METHODS["hybrid"]) == 2e-3
    of_one_seed = of_method(Store(tmp_path), "sweep", "sums", "hybrid")
    assert tuning.means(of_one_seed, TUNING_SEEDS) == {}  # which a sweep by both goes on from
    assert tuning.best_rate(Store(tmp_path), "sums", METHODS["start"]) == 0.0


def test_the_core_is_there_and_what_chooses_differs_in_that_alone():
    assert set(CORE) <= METHODS.keys()
    choices = {name for name, method in METHODS.items() if method.chooses}
    assert {"random", "bottom", "probe", "largest"} <= choices
    assert not choices & {"hybrid", "random_one_rate", "only_full", "budget_20", "lora"}
