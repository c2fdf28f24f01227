import pytest

from hybrid_lightning.data import ChatFormat, EpisodeSource, Mixture, PlainFormat
from hybrid_lightning.data.splitting import Row, Splits, split_rows, without_overlap
from hybrid_lightning.errors import ConfigError


def seeds(rows):
    return [row.columns["seed"] for row in rows]


def test_splits_share_no_seed_whatever_the_source_is_seeded_with():
    sources = [EpisodeSource(400, seed, validation_count=300, test_count=200) for seed in range(3)]
    splits = [source.load() for source in sources]
    assert [len(rows) for rows in vars(splits[0]).values()] == [400, 300, 200]
    by_split = [{seed for of_source in splits for seed in seeds(getattr(of_source, name))} for name in vars(splits[0])]
    assert (
        sum(map(len, by_split)) == len(set.union(*by_split)) and 0 <= min(map(min, by_split)) <= max(map(max, by_split)) < 2**31
    )
    assert splits[0] == sources[0].load() and seeds(splits[0].train) != seeds(splits[1].train)
    assert len(set(seeds(splits[0].train))) == 400


def test_the_policy_sees_one_text_and_rows_stay_apart():
    splits = EpisodeSource(3, prompt="Guess.").load()
    prompts = [PlainFormat().format(row) for row in splits.train]
    assert [prompt.text for prompt in prompts] == ["Guess."] * 3 and len({prompt.columns["seed"] for prompt in prompts}) == 3
    assert ChatFormat().format(splits.test[0]).messages == ({"role": "user", "content": "Guess."},)
    mixed = Mixture({"a": EpisodeSource(3), "b": EpisodeSource(5, seed=1)}).load()
    assert [row.set_name for row in mixed.train] == ["a"] * 3 + ["b"] * 5


def test_rows_with_one_question_are_copies_of_a_problem_only_if_they_have_one_task():
    rows = [Row("Play.", index=index, task=task) for index, task in enumerate("aabc")]
    splits, dropped = without_overlap(Splits(train=rows[1:], validation=rows[:1]))
    assert [row.task for row in splits.train] == ["b", "c"] and dropped["train"] == 1
    parts = [{row.task for row in part} for part in vars(split_rows(rows, 0.25, 0.25, seed=0)).values()]
    assert sum(map(len, parts)) == 3 and all(parts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"count": -1}, "count=-1; give 0 to"), ({"count": 0, "validation_count": 0, "test_count": 0}, "at least one task")],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        EpisodeSource(**arguments)
