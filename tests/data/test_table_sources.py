import json
from dataclasses import replace

import pytest
from datasets import Dataset, DatasetDict
from public_data import public_data

from hybrid_lightning.data import GSM8K_ANSWER, FileSource, HubSource, RowsSource
from hybrid_lightning.errors import ConfigError, DataError


def jsonl(folder, rows, name="train.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(count, start=0):
    return [{"question": f"what is {n}?", "answer": n} for n in range(start, start + count)]


def test_files_become_splits(tmp_path):
    train, test = jsonl(tmp_path, numbered(5)), jsonl(tmp_path, numbered(3, start=4), "test.jsonl")
    splits = FileSource(train, test=test).load()
    assert [row.answer for row in splits.train] == ["0", "1", "2", "3"] and not splits.validation
    row = splits.test[1]
    assert (row.question, row.answer, row.index, row.source) == ("what is 5?", "5", 1, test)
    assert row.columns == {"question": "what is 5?", "answer": 5}


def test_rows_in_memory_give_what_a_file_of_them_gives(tmp_path):
    rows, held = numbered(20), numbered(3, start=18)
    expected = FileSource(jsonl(tmp_path, rows), validation=jsonl(tmp_path, held, "v.jsonl"), test_fraction=0.1, max_rows=19)
    for kind in (list, tuple, iter, Dataset.from_list):
        source = RowsSource(kind(rows), validation=kind(held), test_fraction=0.1, max_rows=19)
        splits = source.load()
        for split, given in vars(expected.load()).items():
            assert [replace(row, source="") for row in getattr(splits, split)] == [replace(row, source="") for row in given]
        assert len(splits.train) == 16 and source.load() == splits, "and again"
    assert source.to_config()["init_args"] == {"train": "20 rows", "validation": "3 rows", "test_fraction": 0.1, "max_rows": 19}
    for wrong, message in (
        ([], "RowsSource: train has no rows"),
        (DatasetDict(train=Dataset.from_list(rows)), r"RowsSource: train row 0 is 'train'; give dicts such as"),
        (
            [{"prompt": "1+1=", "answer": 2}],
            "train has no column 'question'; correct question_column; the columns are prompt, answer",
        ),
        ([*rows, {"question": "?"}], r"train, row 20 \(the first is 0\): answer_column 'answer' is missing"),
    ):
        with pytest.raises(DataError, match=message):
            RowsSource(wrong).load()
    with pytest.raises(ConfigError, match="no data; set at least one of train, validation, test"):
        RowsSource()


def test_fractions_split_from_train(tmp_path):
    path = jsonl(tmp_path, numbered(20))
    splits = FileSource(path, validation_fraction=0.1, test_fraction=0.2, split_seed=1).load()
    assert [len(part) for part in vars(splits).values()] == [14, 2, 4]
    other = jsonl(tmp_path, numbered(3, start=50), "test.jsonl")
    splits = FileSource(path, test=other, validation_fraction=0.1).load()
    assert [len(part) for part in vars(splits).values()] == [18, 2, 3]
    with pytest.raises(ConfigError, match=r"test_fraction=0\.2, but a test split is given"):
        FileSource(path, test=other, test_fraction=0.2).load()
    with pytest.raises(ConfigError, match="needs training rows"):
        FileSource(test=path, validation_fraction=0.2).load()


def test_template_pattern_and_max_rows(tmp_path):
    table = [{"Body": f"{n} men come. ", "Question": "How many?", "solution": f"well\n#### {n},000 "} for n in range(9)]
    path = jsonl(tmp_path, table)
    source = FileSource(path, template="{Body} {Question}", answer_column="solution", answer_pattern=GSM8K_ANSWER, max_rows=4)
    rows = source.load().train
    assert len(rows) == 4 and rows[3].question == "3 men come.  How many?" and rows[3].answer == "3,000"
    assert FileSource(path, question_column="Body", answer_column=None).load().train[0].answer is None


def test_bad_rows_are_named(tmp_path):
    for table, arguments, message in (
        ([{"question": "a", "answer": "1"}], {"template": "{x} {question}"}, "no column 'x'; correct template"),
        ([*numbered(2), {"question": "a"}], {}, r"row 2 \(the first is 0\): answer_column 'answer' is missing"),
        ([{"question": "", "answer": "1"}], {}, "question_column 'question' is empty"),
        ([{"question": "a", "answer": ["1"]}], {}, r"is a list, not text or a number: \['1'\]"),
        ([{"question": "a", "answer": float("nan")}], {}, "is nan, which is not a number"),
        ([{"question": "a", "answer": "no"}], {"answer_pattern": "#(.)"}, "finds nothing in 'no'"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            FileSource(jsonl(tmp_path, table), **arguments).load()
        assert "\n" not in str(caught.value) and "train.jsonl" in str(caught.value)


def test_bad_rows_are_skipped_on_request_with_a_count(tmp_path, caplog):
    table = [{"question": "a", "answer": "x"}, {"question": "b", "answer": None}, *numbered(2), {"question": "c"}]
    with caplog.at_level("INFO"):
        rows = FileSource(jsonl(tmp_path, table), skip_bad_rows=True).load().train
    assert [row.index for row in rows] == [0, 2, 3]
    assert "dropped 2 of 5 rows that cannot be used; the first:" in caplog.text
    with pytest.raises(DataError, match="none of the 1 rows can be used"):
        FileSource(jsonl(tmp_path, [{"question": "a", "answer": ""}]), skip_bad_rows=True).load()


def test_bad_arguments_are_refused_at_once():
    for arguments, message in (
        ({}, "set at least one of train, validation, test"),
        ({"train": "x", "max_rows": 0}, "max_rows=0"),
        ({"train": "x", "template": "{choices[]}"}, r"write \{\{ and \}\}"),
        ({"train": "x", "answer_pattern": "(a"}, "is not a regular expression"),
        ({"train": "x", "answer_pattern": "(a)", "answer_column": None}, "nothing to search in; set answer_column"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            FileSource(**arguments)
        assert "\n" not in str(caught.value)


def test_gsm8k_and_mawps():
    rows = FileSource(public_data("mawps/singleop.jsonl"), question_column="input", answer_column="target").load().train
    assert len(rows) == 562 and rows[0].answer == "14" and all(row.question and row.answer for row in rows)
    splits = FileSource(public_data("gsm8k/train.jsonl"), answer_pattern=GSM8K_ANSWER, validation_fraction=0.05).load()
    assert (len(splits.train), len(splits.validation)) == (7099, 374)


@pytest.fixture
def data_set(tmp_path, monkeypatch):
    """A data set in the layout of the hub, and a cache of its own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "some_data"
    data.mkdir()
    for split, numbers in (("train", range(8)), ("test", range(100, 103))):
        rows = [{"question": f"what is {n}?", "answer": f"It is <<{n}>>.\n#### {n}"} for n in numbers]
        jsonl(data, rows, f"{split}.jsonl")
    return str(data)


def test_splits_and_slices_of_a_data_set(data_set):
    splits = HubSource(data_set, test_split="test", answer_pattern=GSM8K_ANSWER, validation_fraction=0.25).load()
    assert [len(part) for part in vars(splits).values()] == [6, 2, 3]
    assert (splits.test[2].answer, splits.test[2].index, splits.test[2].source) == ("102", 2, f"{data_set} test")
    splits = HubSource(data_set, train_split="train[:5]", validation_split="train[5:]", max_rows=2).load()
    assert [row.question for row in splits.train] == ["what is 0?", "what is 1?"]
    assert [row.question for row in splits.validation] == ["what is 5?", "what is 6?"]
    splits = HubSource(data_set, validation_split="train[:3]").load()
    assert [len(part) for part in vars(splits).values()] == [5, 3, 0], "what overlaps goes from train"


def test_errors_of_the_hub_are_one_line(data_set):
    for arguments, message in (
        ({"test_split": "dev"}, "test_split='dev': data set .* has no such split; it has train, test; correct test_split"),
        ({"name": "main"}, "has no configuration name='main'; give one of default"),
        ({"question_column": "q"}, "has no column 'q'"),
        ({"path": "./nobody"}, r"path='\./nobody' does not exist \(looked for /.*/nobody\); correct it"),
        ({"train_split": None}, "at least one of train_split"),
    ):
        with pytest.raises((DataError, ConfigError), match=message) as caught:
            HubSource(**{"path": data_set, **arguments}).load()
        assert "\n" not in str(caught.value)
