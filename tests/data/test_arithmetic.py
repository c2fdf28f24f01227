import operator

import pytest

from hybrid_lightning.data import ArithmeticSource, ProductSource
from hybrid_lightning.data.arithmetic import FACTORS
from hybrid_lightning.errors import ConfigError

TASKS = {ArithmeticSource: ("+", operator.add), ProductSource: ("*", operator.mul)}


def pairs(rows):
    return {(row.columns["a"], row.columns["b"]) for row in rows}


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right_and_columns_fit_templates(task):
    sign, result = TASKS[task]
    splits = task(train_size=50, validation_size=20, test_size=20).load()
    for row in splits.train + splits.validation + splits.test:
        a, b = row.columns["a"], row.columns["b"]
        assert 10 <= a <= (99 if sign == "+" else 999) and b in (range(10, 100) if sign == "+" else FACTORS)
        assert (row.question, row.answer) == (f"{a}{sign}{b}=", str(result(a, b)))
        assert row.columns["question"] == row.question and row.columns["answer"] == row.answer
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (50, 20, 20)
    assert task(seed=1).load() == task(seed=1).load() and task(seed=1).load().validation != task(seed=2).load().validation


def test_no_problem_is_held_out_under_any_seed_and_no_sum_in_either_order():
    for task in TASKS:
        pools = {"train": set(), "validation": set(), "test": set()}
        for seed in range(5):
            for name, rows in vars(task(train_size=2000, seed=seed).load()).items():
                pools[name] |= pairs(rows)
        held_out = pools["validation"] | pools["test"]
        assert not held_out & pools["train"] and not pools["validation"] & pools["test"]
        if task is ArithmeticSource:
            assert not {(b, a) for a, b in held_out} & pools["train"]


def test_all_training_problems_are_there_by_default_and_a_tenth_in_each_held_out_split():
    every = [ProductSource().split_of(a, b) for a in range(10, 1000) for b in FACTORS]
    assert set(every) == {"train", "validation", "test"} and len(ProductSource().load().train) == every.count("train")
    assert all(0.08 < every.count(name) / len(every) < 0.12 for name in ("validation", "test"))


def test_split_membership_is_pinned():
    # The shipped policy was pretrained on these splits: another hash would put problems it has seen into validation.
    split_of = ProductSource().split_of
    assert [split_of(a, 7) for a in range(100, 130)].count("train") == 23
    held_out = [(a, b) for a in range(100, 106) for b in FACTORS if split_of(a, b) != "train"]
    assert held_out[:5] == [(100, 4), (100, 5), (101, 7), (102, 6), (103, 7)]
    assert held_out[5:] == [(103, 8), (104, 5), (104, 7), (105, 2), (105, 7)]


def test_impossible_values_are_refused_at_once():
    for name, value in (("low", 100), ("high", 5000), ("train_size", 0)):
        with pytest.raises(ConfigError, match=f"{name}={value}"):
            ArithmeticSource(**{name: value})
    with pytest.raises(ConfigError, match=r"validation_size=200, .* give \d+ validation problems"):
        ArithmeticSource(high=19).load()


def test_products_may_have_larger_factors_with_numbers_of_their_own_and_the_same_splits():
    wide = ProductSource(100, 199, low_factor=5, high_factor=40, validation_size=0, test_size=0)
    rows = wide.load().train
    assert all(row.answer == str(row.columns["a"] * row.columns["b"]) for row in rows)
    assert {row.columns["b"] for row in rows} == set(range(5, 41)) and len({row.index for row in rows}) > 2000
    assert wide.split_of(100, 7) == ProductSource().split_of(100, 7)
    for options, reason in (({"low_factor": 3, "high_factor": 2}, "are not a range; give"), ({"high": 10**7}, "narrower ranges")):
        with pytest.raises(ConfigError, match=reason):
            ProductSource(**options)
