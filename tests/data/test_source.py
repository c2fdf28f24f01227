import pytest

from hybrid_lightning.data import ChatFormat, EpisodeSource, Mixture, PlainFormat, PromptDataModule, PromptSource
from hybrid_lightning.data.splitting import Row, Splits, split_rows, without_overlap
from hybrid_lightning.errors import ConfigError, DataError


class Fixed(PromptSource):
    def __init__(self, name, train=(), validation=(), test=()):
        splits = {"train": train, "validation": validation, "test": test}
        self.splits = {
            split: [Row(question, "1", index, f"{name}.csv", {"q": question}) for index, question in enumerate(questions)]
            for split, questions in splits.items()
        }

    def read(self):
        return Splits(**self.splits)


SETS = {
    "sums": Fixed("sums", train=["1+1", "2+2", "3+3"], validation=["5+5"], test=["6+6"]),
    "quiz": Fixed("quiz", train=["who?"], validation=["where?"]),
    "aime": Fixed("aime", test=["x?", "2+2"]),
}


def test_prompts_keep_the_name_weight_row_and_source_of_their_set():
    data = PromptDataModule(Mixture(SETS, {"sums": 3, "quiz": 1}), PlainFormat())
    assert [(p.text, p.set_name, p.set_weight, p.index, p.source) for p in data.train_prompts] == [
        ("1+1", "sums", 3, 0, "sums.csv"),
        ("3+3", "sums", 3, 2, "sums.csv"),  # 2+2 is held out by another set
        ("who?", "quiz", 1, 0, "quiz.csv"),
    ]
    assert [(p.text, p.set_name, p.set_weight) for p in data.test_prompts] == [
        ("6+6", "sums", None),
        ("x?", "aime", None),
        ("2+2", "aime", None),
    ]
    assert {row.set_weight for row in Mixture(SETS).load().train} == {None}, "without weights all rows are one pool"


def test_sets_and_weights_that_do_not_fit_are_refused():
    for arguments, error, message in (
        (({},), ConfigError, "has no name; name each"),
        (({"a": Mixture(SETS)},), ConfigError, "set 'a' is a mixture itself"),
        ((SETS, {"sum": 1}), ConfigError, "'sum', which is not a set; the sets are sums, quiz, aime"),
        ((SETS, {"sums": float("nan")}), ConfigError, "weight of 'sums' is nan"),
        ((SETS, {"sums": 1}), DataError, "set 'quiz' has training rows but no weight"),
        ((SETS, {"sums": 1, "quiz": 1, "aime": 1}), DataError, "set 'aime' has a weight but no training rows"),
    ):
        with pytest.raises(error, match=message):
            Mixture(*arguments).load()


# ---- episodes


def seeds(rows):
    return [row.columns["seed"] for row in rows]


def test_splits_share_no_seed_whatever_the_source_is_seeded_with():
    sources = [EpisodeSource(400, seed, validation_count=300, test_count=200) for seed in range(3)]
    splits = [source.load() for source in sources]
    assert [len(rows) for rows in vars(splits[0]).values()] == [400, 300, 200]
    by_split = [{seed for of_source in splits for seed in seeds(getattr(of_source, name))} for name in vars(splits[0])]
    every = set.union(*by_split)
    assert sum(map(len, by_split)) == len(every) and 0 <= min(every) <= max(every) < 2**31
    assert splits[0] == sources[0].load() and seeds(splits[0].train) != seeds(splits[1].train)
    assert len(set(seeds(splits[0].train))) == 400
    assert [{seed % 3 for seed in part} for part in by_split] == [{0}, {1}, {2}], "not by luck"


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


def test_bad_arguments():
    for arguments, message in (((-1,), "count=-1; give 0 to"), ((0, 0, 0, 0), "set at least one of them")):
        with pytest.raises(ConfigError, match=message):
            EpisodeSource(*arguments)
