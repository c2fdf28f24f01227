import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_source import Fixed

from hybrid_lightning.data import Row, problem_key, split_rows
from hybrid_lightning.errors import ConfigError, DataError


def rows(questions):
    return [Row(question, index=index, source="here") for index, question in enumerate(questions)]


def test_problem_key_compares_what_is_asked():
    for one, other in (("How many ?", "how  many?"), ("cafe\u0301", "caf\u00e9"), ("a\n b", "A B")):
        assert problem_key(one) == problem_key(other)
    assert len({problem_key(text) for text in ("12 + 3", "1 2 + 3", "1.5 m", "15 m")}) == 4


@given(st.lists(st.sampled_from("abcdefgh"), min_size=12, max_size=60), st.integers(0, 5))
def test_split_rows_partitions_and_never_tears_copies(questions, seed):
    try:
        splits = split_rows(rows(questions), 0.2, 0.2, seed)
    except ConfigError:  # so few different questions that nothing is left for one of the splits
        assert len(set(questions)) < 8
        return
    parts = [splits.train, splits.validation, splits.test]
    assert sorted(row.index for part in parts for row in part) == list(range(len(questions)))
    keys = [{row.question for row in part} for part in parts]
    assert all(keys) and not (keys[0] & keys[1] or keys[0] & keys[2] or keys[1] & keys[2])
    assert all([row.index for row in part] == sorted(row.index for row in part) for part in parts)


def test_split_rows_follows_the_seed():
    data = rows([f"question {n}" for n in range(100)])
    splits = split_rows(data, 0.1, 0.25, seed=3)
    assert [len(part) for part in vars(splits).values()] == [65, 10, 25]
    assert splits == split_rows(data, 0.1, 0.25, seed=3) and splits.test != split_rows(data, 0.1, 0.25, seed=4).test


def test_split_rows_refuses_fractions():
    for questions, validation, test, message in (
        ("abcdefghij", -0.1, 0.0, "validation_fraction=-0.1"),
        ("abcdefghij", 0.5, 0.6, "must be below 1"),
        ("abcdefghij", 0.01, 0.0, "is less than one row"),
        ("aaaaaaaaaa", 0.1, 0.0, r"leave no row to train on \(10 rows, 1 distinct questions\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            split_rows(rows(questions), validation, test, seed=0)


def test_load_drops_overlap_from_train_says_so_and_refuses_a_split_that_is_all_overlap(caplog):
    caplog.set_level("INFO")
    assert len(Fixed("x", train=["a", "a", "b"], test=["c"]).load().train) == 3 and not caplog.text
    splits = Fixed("x", train=["a", "b", "C ", "d"], validation=["c", "e", "F"], test=["f", "d"]).load()
    assert [[row.question for row in part] for part in vars(splits).values()] == [["a", "b"], ["c", "e"], ["f", "d"]]
    assert "Fixed: dropped 2 training rows that also occur in" in caplog.text and "dropped 1 validation rows" in caplog.text
    with pytest.raises(DataError, match=r"every question of the train split \(2 rows"):
        Fixed("x", train=["a", "b"], test=["b", "a", "c"]).load()
