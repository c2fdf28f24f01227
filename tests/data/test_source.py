import pytest

from hybrid_lightning.data import ArithmeticSource, FileSource, Mixture, PlainFormat, PromptDataModule, PromptSource, Row, Splits
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
    assert [(p.text, p.set_name, p.set_weight) for p in data.validation_prompts] == [
        ("5+5", "sums", None),
        ("where?", "quiz", None),
    ]
    assert [(p.text, p.set_name) for p in data.test_prompts] == [("6+6", "sums"), ("x?", "aime"), ("2+2", "aime")]
    assert {row.set_weight for row in Mixture(SETS).load().train} == {None}, "without weights all rows are one pool"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (({},), ConfigError, "has no name; name each"),
        (({"a": Mixture(SETS)},), ConfigError, "set 'a' is a mixture itself"),
        ((SETS, {"sum": 1}), ConfigError, "'sum', which is no set; the sets are sums, quiz, aime"),
        ((SETS, {"sums": float("nan")}), ConfigError, "weight of 'sums' is nan"),
        ((SETS, {"sums": 1}), DataError, "set 'quiz' has training rows but no weight"),
        ((SETS, {"sums": 1, "quiz": 1, "aime": 1}), DataError, "set 'aime' has a weight but no training rows"),
    ],
)
def test_sets_and_weights_that_do_not_fit_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Mixture(*arguments).load()


def test_an_error_in_a_set_names_its_file_and_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "1"}\n{"question": "b"}')
    with pytest.raises(DataError, match=r"rows\.jsonl, row 1 .* answer_column 'answer' is missing"):
        Mixture({"files": FileSource(str(path)), "sums": ArithmeticSource()}).load()
