import pytest

from hybrid_lightning.data import PlainFormat, ProductSource, PromptDataModule
from hybrid_lightning.data.arithmetic import FACTORS, product_split
from hybrid_lightning.errors import ConfigError


def pairs(rows):
    return {(row.columns["a"], row.columns["b"]) for row in rows}


def test_answers_are_products_and_columns_fit_templates():
    splits = ProductSource(train_size=50, validation_size=20, test_size=20).load()
    for row in splits.train + splits.validation + splits.test:
        a, b = row.columns["a"], row.columns["b"]
        assert 10 <= a <= 999 and 2 <= b <= 9
        assert (row.question, row.answer) == (f"{a}*{b}=", str(a * b))
        assert row.columns["question"] == row.question and row.columns["answer"] == row.answer
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (50, 20, 20)


def test_splits_are_disjoint_under_all_seeds_together():
    pools = {"train": set(), "validation": set(), "test": set()}
    for seed in range(20):
        splits = ProductSource(train_size=500, seed=seed).load()
        for name, pool in pools.items():
            pool |= pairs(getattr(splits, name))
    assert not pools["train"] & (pools["validation"] | pools["test"])
    assert not pools["validation"] & pools["test"]


def test_every_product_is_in_one_split_and_a_tenth_in_each_held_out_one():
    every = [product_split(a, b) for a in range(10, 1000) for b in FACTORS]
    assert set(every) == {"train", "validation", "test"}
    for name in ("validation", "test"):
        assert 0.08 < every.count(name) / len(every) < 0.12
    assert len(ProductSource().load().train) == every.count("train")


def test_split_membership_is_pinned():
    # The shipped policy was pretrained on these splits: another hash would put what it has seen into validation.
    assert [product_split(a, 7) for a in range(100, 130)].count("train") == 23
    assert [(a, b) for a in range(100, 106) for b in FACTORS if product_split(a, b) != "train"] == [
        (100, 4),
        (100, 5),
        (101, 7),
        (102, 6),
        (103, 7),
        (103, 8),
        (104, 5),
        (104, 7),
        (105, 2),
        (105, 7),
    ]


def test_seed_changes_the_draw_and_nothing_else_does():
    assert ProductSource(seed=1).load() == ProductSource(seed=1).load()
    assert ProductSource(seed=1).load().validation != ProductSource(seed=2).load().validation


def test_prompts_end_where_the_answer_begins():
    data = PromptDataModule(ProductSource(), PlainFormat(), validation_prompts=7)
    data.setup("fit")
    assert len(data.validation_prompts) == 7
    assert all(prompt.text.endswith("=") and prompt.answer.isdigit() for prompt in data.validation_prompts)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"low": 50, "high": 40}, "low=50 and high=40"),
        ({"low": -1}, "low=-1"),
        ({"high": 10**7}, "high=10000000"),
        ({"train_size": 0}, "train_size=0"),
        ({"validation_size": -1}, "validation_size=-1"),
        ({"test_size": -3}, "test_size=-3"),
    ],
)
def test_impossible_values_are_refused_at_once(arguments, named):
    with pytest.raises(ConfigError, match=named) as error:
        ProductSource(**arguments)
    assert "\n" not in str(error.value)


def test_more_problems_than_there_are_is_refused_with_their_number():
    available = sum(product_split(a, b) == "test" for a in range(10, 20) for b in FACTORS)
    with pytest.raises(ConfigError, match=f"test_size=400, .* give {available} test problems"):
        ProductSource(high=19, validation_size=1).load()
