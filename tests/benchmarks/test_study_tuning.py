import pytest
from study_records import keep, record

from benchmarks.study import tuning
from benchmarks.study.comparison import compare
from benchmarks.study.methods import METHODS
from benchmarks.study.records import TUNING_SEEDS, of_method
from benchmarks.study.store import Store


def test_tuning_starts_at_the_rates_of_the_task():
    rl = {"model": {"lr_full": 1e-5, "lr_lora": 3e-4}}
    assert tuning.first_rates(METHODS["fft"], rl) == [5e-6, 1e-5, 2e-5]
    assert tuning.first_rates(METHODS["hybrid"], rl) == [1.5e-4, 3e-4, 6e-4]
    supervised = {"model": {"class_path": "SupervisedModule", "init_args": {"lr_lora": 2e-3}}}
    assert tuning.first_rates(METHODS["lora"], supervised) == [1e-3, 2e-3, 4e-3]
    with pytest.raises(SystemExit, match=r"has no model\.lr_full, from which tuning starts; name one"):
        tuning.first_rates(METHODS["fft"], supervised)  # the module's own would depend on the model


def test_tuning_tries_the_first_rates_then_goes_beyond_a_best_edge():
    first = [2.5e-3, 5e-3, 1e-2]
    rising = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    for accuracies, then in (
        ((), first),
        ((0.1,), [5e-3, 1e-2]),
        (rising[:3], [0.02]),
        ((0.1, 0.2, 0.3, 0.25), []),
        ((0.3, 0.2, 0.1), [0.00125]),
        ((0.2, 0.3, 0.3), [0.02]),  # as good as its neighbour
        (rising, []),  # not for ever
    ):
        tuned = dict(zip((*first, 0.02, 0.04, 0.08, 0.16), accuracies, strict=False))
        assert tuning.next_rates(first, tuned) == then
    assert tuning.outcome(tuned).endswith(", at the edge of the 7 tried")
    assert tuning.outcome({5e-3: 0.2, 1e-2: 0.3, 0.02: 0.25}) == "best learning rate 0.01, validation 0.300"


def test_a_rate_counts_when_all_tuning_seeds_have_it_and_one_is_enough_where_all_rates_have_it(tmp_path):
    first, second = TUNING_SEEDS
    for rate, seed, value in ((0.01, first, 0.2), (0.01, second, 0.5), (0.02, first, 0.5)):
        keep(tmp_path, record(rate=rate, seed=seed, purpose="sweep", validation=value))
    assert tuning.means(of_method(Store(tmp_path), "sweep", "sums", "lora")) == {0.01: pytest.approx(0.35)}
    with pytest.raises(SystemExit, match="sweep --task sums"):
        tuning.best_rate(Store(tmp_path), "sums", METHODS["lora"])
    for rate, value in ((1e-3, 0.1), (2e-3, 0.3), (4e-3, 0.2)):
        keep(tmp_path, record("hybrid", rate, first, "sweep", validation=value))
    assert tuning.best_rate(Store(tmp_path), "sums", METHODS["hybrid"]) == 2e-3
    of_one_seed = of_method(Store(tmp_path), "sweep", "sums", "hybrid")
    assert tuning.means(of_one_seed, TUNING_SEEDS) == {}  # a sweep by both continues from these
    assert tuning.best_rate(Store(tmp_path), "sums", METHODS["start"]) == 0.0


def test_matched_lora_trains_as_much_as_the_hybrid_and_a_method_is_judged_at_its_tuned_rate_alone(tmp_path):
    keep(tmp_path, record("hybrid", purpose="sweep", trainable=1010), record("lora", purpose="sweep", trainable=200, rank=2))
    assert tuning.rank_of(METHODS["lora_matched"], Store(tmp_path), "sums") == 11
    assert tuning.rank_of(METHODS["lora"], Store(tmp_path), "sums") is None
    for rate, validation in ((1e-2, 0.6), (2e-2, 0.5)):
        keep(tmp_path, *(record("probe", rate, seed=s, accuracy=0.1 if rate == 2e-2 else 0.7) for s in range(8)))
        keep(tmp_path, *(record("probe", rate, s, "sweep", validation=validation) for s in TUNING_SEEDS))
    row = compare(Store(tmp_path), "sums").rows["probe"]
    assert row.rate == 1e-2 and row.accuracy.number == 8 and row.accuracy.value == pytest.approx(0.7)
