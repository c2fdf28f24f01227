import json

import pytest

from hybrid_lightning.data import GSM8K_ANSWER, HubSource
from hybrid_lightning.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data set in the layout of the hub, and a cache of its own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "some_data"
    data.mkdir()
    for split, numbers in (("train", range(8)), ("test", range(100, 103))):
        rows = [{"question": f"what is {n}?", "answer": f"It is <<{n}>>.\n#### {n}"} for n in numbers]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(data)


def test_splits_of_a_data_set(folder):
    splits = HubSource(folder, test_split="test", answer_pattern=GSM8K_ANSWER, validation_fraction=0.25).load()
    assert [len(part) for part in vars(splits).values()] == [6, 2, 3]
    assert (splits.test[2].answer, splits.test[2].index, splits.test[2].source) == ("102", 2, f"{folder} test")


def test_slices_and_max_rows(folder):
    splits = HubSource(folder, train_split="train[:5]", validation_split="train[5:]", max_rows=2).load()
    assert [row.question for row in splits.train] == ["what is 0?", "what is 1?"]
    assert [row.question for row in splits.validation] == ["what is 5?", "what is 6?"]


def test_slices_that_overlap_lose_their_copies_in_train(folder):
    splits = HubSource(folder, validation_split="train[:3]").load()
    assert [len(part) for part in vars(splits).values()] == [5, 3, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"test_split": "dev"}, "test_split='dev': data set .* has no such split, but train, test: correct test_split"),
        ({"test_split": "test[:x]"}, r"test_split='test\[:x\]' of data set .* cannot be loaded: ValueError: .*check path, name"),
        ({"name": "main"}, "has no configuration name='main': give one of default"),
        ({"question_column": "q"}, "has no column 'q'"),
    ],
)
def test_errors_are_one_line(folder, arguments, message):
    with pytest.raises(DataError, match=message) as caught:
        HubSource(folder, **arguments).load()
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_no_hub_id(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"path='\./nobody' does not exist \(looked for {tmp_path}/nobody\): correct it"):
        HubSource("./nobody").load()


def test_no_split_at_all():
    with pytest.raises(ConfigError, match="at least one of train_split"):
        HubSource("x/y", train_split=None)
