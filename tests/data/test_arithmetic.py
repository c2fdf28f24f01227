import pytest

from hybrid_lightning.data import ArithmeticSource
from hybrid_lightning.errors import ConfigError


def pairs(rows):
    return {(row.columns["a"], row.columns["b"]) for row in rows}


def test_answers_are_sums_and_columns_fit_templates():
    splits = ArithmeticSource(train_size=50, validation_size=20, test_size=20).load()
    for row in splits.train + splits.validation + splits.test:
        a, b = row.columns["a"], row.columns["b"]
        assert 10 <= a <= 99 and 10 <= b <= 99
        assert (row.question, row.answer) == (f"{a}+{b}=", str(a + b))
        assert row.columns["question"] == row.question and row.columns["answer"] == row.answer
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (50, 20, 20)


def test_no_sum_is_held_out_in_either_order_under_any_seed():
    trained, held_out = set(), set()
    for seed in range(5):
        splits = ArithmeticSource(seed=seed).load()
        trained |= pairs(splits.train)
        held_out |= pairs(splits.validation) | pairs(splits.test)
    assert not held_out & trained
    assert not {(b, a) for a, b in held_out} & trained


def test_all_training_sums_are_there_by_default():
    splits = ArithmeticSource(low=0, high=30, validation_size=0, test_size=0).load()
    source = ArithmeticSource()
    assert pairs(splits.train) == {(a, b) for a in range(31) for b in range(31) if source.split_of(a, b) == "train"}
    assert splits.validation == [] and splits.test == []


def test_seed_changes_the_draw_and_nothing_else_does():
    assert ArithmeticSource(seed=1).load() == ArithmeticSource(seed=1).load()
    assert ArithmeticSource(seed=1).load().validation != ArithmeticSource(seed=2).load().validation


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"low": 50, "high": 40}, "low=50 and high=40"),
        ({"low": -1}, "low=-1"),
        ({"high": 5000}, "high=5000"),
        ({"train_size": 0}, "train_size=0"),
        ({"validation_size": -1}, "validation_size=-1"),
        ({"test_size": -3}, "test_size=-3"),
    ],
)
def test_impossible_values_are_refused_at_once(arguments, named):
    with pytest.raises(ConfigError, match=named) as error:
        ArithmeticSource(**arguments)
    assert "\n" not in str(error.value)


def test_more_problems_than_there_are_is_refused_with_their_number():
    available = sum(ArithmeticSource().split_of(a, b) == "validation" for a in range(10, 20) for b in range(10, 20))
    with pytest.raises(ConfigError, match=f"validation_size=200, .* give {available} validation problems"):
        ArithmeticSource(high=19).load()
