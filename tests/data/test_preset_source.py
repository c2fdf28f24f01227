"""Presets on rows in the layout that the data sets have on the hub, and on copies that are laid out otherwise."""

import json

import pytest
from preset_rows import ANSWERS, DAPO, DAPO_PROBLEM, REWARDS, ROWS
from public_data import public_data

from hybrid_lightning.data import (
    AIME24,
    AIME25,
    AMC23,
    GSM8K,
    MATH,
    MATH500,
    DAPOMath17k,
    HubSource,
    LeetCode,
    MMLUPro,
    preset_source,
)
from hybrid_lightning.data.preset_source import last_boxed
from hybrid_lightning.errors import ConfigError, DataError
from hybrid_lightning.rewards import MathMatch
from hybrid_lightning.types import Prompt


def write(folder, name, *rows):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def only_test(preset, path, **options):
    splits = {"train_split": None, "validation_split": None, "test_split": "test"}
    return preset(local_path=path, **splits, **options).load().test


@pytest.mark.parametrize("case", ROWS)
def test_a_row_and_its_reward_that_tells_right_from_wrong(case, tmp_path):
    (preset, columns), (question, answer, *completions) = ROWS[case], ANSWERS[case]
    (row,) = only_test(preset, write(tmp_path, "test.jsonl", columns))
    assert (row.question, row.answer) == (question, answer) and row.columns == columns and row.index == 0
    prompt = Prompt(text=row.question, answer=row.answer, columns=row.columns)
    scores = REWARDS.get(preset, MathMatch)()
    scores.check_prompt(prompt)
    assert list(scores(completions, [prompt] * 2)) == [1.0, 0.0]


HUB = {
    GSM8K: ("openai/gsm8k", "main", {"train_split": "train", "test_split": "test"}),
    MATH: ("DigitalLearningGmbH/MATH-lighteval", None, {"train_split": "train", "test_split": "test"}),
    MATH500: ("HuggingFaceH4/MATH-500", None, {"test_split": "test"}),
    DAPOMath17k: ("open-r1/DAPO-Math-17k-Processed", None, {"train_split": "train"}),
    AIME24: ("HuggingFaceH4/aime_2024", None, {"test_split": "train"}),
    AIME25: ("math-ai/aime25", None, {"test_split": "test"}),
    AMC23: ("math-ai/amc23", None, {"test_split": "test"}),
    MMLUPro: ("TIGER-Lab/MMLU-Pro", None, {"validation_split": "validation", "test_split": "test"}),
    LeetCode: ("newfacade/LeetCodeDataset", None, {"train_split": "train", "test_split": "test"}),
}


@pytest.mark.parametrize("preset", HUB)
def test_what_is_asked_of_the_hub(preset, monkeypatch):
    asked = []
    columns = next(row[1] for row in ROWS.values() if row[0] is preset)
    question = next(name for name in ("problem", "query", "prompt", "question") if name in columns)

    def read(parameter, split, path, name, revision, max_rows):
        asked.append((path, name, parameter, split, revision, max_rows))
        return [{**columns, question: f"{parameter} {columns[question]}"}]

    monkeypatch.setattr(preset_source, "read_hub_split", read)
    splits = preset(revision="v1", max_rows=7).load()
    path, name, wanted = HUB[preset]
    assert asked == [(path, name, parameter, split, "v1", 7) for parameter, split in wanted.items()]
    for parameter in wanted:
        (row,) = getattr(splits, parameter.removesuffix("_split"))
        assert row.source == f"{path} {wanted[parameter]}"


def test_a_clone_of_the_repository(tmp_path):
    rows = [{"question": f"q{n}", "answer": f"#### {n}"} for n in range(6)]
    write(tmp_path, "main/train-00000-of-00002.jsonl", *rows[:2])
    write(tmp_path, "main/train-00001-of-00002.jsonl", *rows[2:4])
    write(tmp_path, "main/test-00000-of-00001.jsonl", *rows[4:])
    write(tmp_path, "socratic/train-00000-of-00001.jsonl", {"question": "socratic", "answer": "#### 1"})
    write(tmp_path, ".cache/train.jsonl", {"question": "hidden", "answer": "#### 1"})
    splits = GSM8K(local_path=str(tmp_path)).load()
    assert [row.question for row in splits.train] == ["q0", "q1", "q2", "q3"]
    assert [row.answer for row in splits.test] == ["4", "5"]
    assert splits.train[0].source == str(tmp_path / "main") and splits.test[0].source.endswith("test-00000-of-00001.jsonl")


@pytest.mark.parametrize("whole", ["", "data/"])
def test_subsets_in_a_clone_do_not_repeat_the_whole(tmp_path, whole):
    rows = [{"problem": f"p{n}", "solution": rf"\boxed{{{n}}}"} for n in range(4)]
    for name, some in ((f"{whole}train.jsonl", rows), ("algebra/train.jsonl", rows[:2])):
        write(tmp_path, name, *some)
    assert len(MATH(local_path=str(tmp_path), test_split=None).load().train) == 4


def test_the_only_file_serves_the_only_split_whatever_its_name(tmp_path):
    row = ROWS["aime24"][1]
    for name in ("aime.jsonl", "test.jsonl", "train.jsonl"):
        folder = tmp_path / name.removesuffix(".jsonl")
        path = write(folder, name, row)
        assert len(AIME24(local_path=path).load().test) == len(AIME24(local_path=str(folder)).load().test) == 1


def test_a_split_may_serve_something_else_and_be_split(tmp_path):
    rows = [{"question": f"q{n}", "options": ["x", "y"], "answer": "A"} for n in range(20)]
    write(tmp_path, "test.jsonl", *rows)
    splits = MMLUPro("test", None, None, local_path=str(tmp_path), validation_fraction=0.1, test_fraction=0.2).load()
    assert [len(part) for part in vars(splits).values()] == [14, 2, 4]


def test_problems_of_dapo_are_kept_once_in_three_subsets_and_presets_are_no_hub_sources(tmp_path):
    row = ROWS["dapo original"][1]
    other = {**row, "prompt": [{"role": "user", "content": DAPO.format("Another one.")}]}
    path = write(tmp_path, "dapo-math-17k.jsonl", row, other, row, row)
    splits = DAPOMath17k(local_path=path).load()
    assert [(row.question, row.index) for row in splits.train] == [(DAPO_PROBLEM, 0), ("Another one.", 1)]
    # A config that changes from one to the other inherits arguments of the same name: `path` must be none of them
    assert not isinstance(GSM8K(), HubSource) and not hasattr(GSM8K(), "path")
    assert DAPOMath17k(subset="en").hub_name == "en" and DAPOMath17k().hub_name is None
    with pytest.raises(ConfigError, match="subset='fr'; give one of all, en, cn"):
        DAPOMath17k(subset="fr")


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("gsm8k", {"answer": "no mark"}, "column 'answer' has no answer after ####: 'no mark'"),
        ("math", {"solution": "no box"}, r"the solution has no \\boxed\{\} with an answer"),
        ("aime25", {"answer": 1000}, "'1000' is no whole number from 0 to 999"),
        ("mmlu_pro", {"answer": "K"}, "column 'answer' is 'K', which is no letter of the 10 options"),
        ("mmlu_pro", {"answer_index": 8.5}, "column 'answer' is 'C', but 'answer_index' is 8.5"),
        ("mmlu_pro", {"options": "A, B"}, "column 'options' must be a list of 2 to 26 options, not 'A, B'"),
        ("dapo", {"reward_model": "x"}, "column 'reward_model' is no JSON"),
        ("dapo", {"reward_model": {}}, "there is no column 'ground_truth'"),
        ("leetcode", {"test": ""}, "column 'test' is empty"),
    ],
)
def test_a_bad_row_is_named_or_skipped(case, change, message, tmp_path):
    preset, columns = ROWS[case]
    path = write(tmp_path, "test.jsonl", columns, {**columns, **change})
    with pytest.raises(DataError, match=rf"test\.jsonl, row 1 \(the first is 0\): {preset.__name__}: .*{message}.*skip_bad_rows"):
        only_test(preset, path)
    assert len(only_test(preset, path, skip_bad_rows=True)) == 1


@pytest.mark.parametrize("answer", [r"336^\circ", "336\u00b0", 336.0, "$336.0$"])
def test_what_copies_put_around_an_answer_of_aime_is_left_out(answer, tmp_path):
    assert only_test(AIME25, write(tmp_path, "test.jsonl", {"question": "?", "answer": answer}))[0].answer == "336"


@pytest.mark.parametrize("answer", ["No roots", "Tuesday."])
def test_an_answer_of_math_in_words_is_one_that_can_be_compared_with(answer, tmp_path):
    row = {"problem": "?", "solution": rf"It is $\boxed{{{answer}}}$.", "answer": answer}
    for preset in (MATH, MATH500):
        prompt = Prompt(text="?", answer=only_test(preset, write(tmp_path, "test.jsonl", row))[0].answer)
        MathMatch().check_prompt(prompt)
        assert MathMatch()([row["solution"], r"\boxed{odd}", rf"\boxed{{\text{{{answer}}}}}"], [prompt] * 3) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"local_path": "nowhere"}, DataError, "local_path='nowhere' does not exist"),
        ({"local_path": "."}, DataError, "no file for train_split='train'; name one train.jsonl, .* the files are test.jsonl"),
        ({"local_path": ".", "train_split": "train[:5]"}, ConfigError, r"train_split='train\[:5\]': slices are for the hub"),
    ],
)
def test_what_cannot_be_found(arguments, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "test.jsonl", ROWS["gsm8k"][1])
    with pytest.raises(error, match=message):
        GSM8K(**arguments).load()


def test_the_last_box():
    nested = r"\left\{\frac{1}{2}\right\}"
    boxes = {r"\boxed{1} and \boxed{2}": "2", rf"$\boxed{{{nested}}}$": nested, r"$\boxed 7$.": "7", r"\fbox{ 3 }": "3"}
    for text, answer in {**boxes, r"\boxed{1} \boxed{2": "1", "none": None}.items():
        assert last_boxed(text) == answer


@pytest.mark.parametrize(
    ("preset", "path", "options", "count"),
    [
        (GSM8K, "gsm8k", {}, 1319),
        (AIME24, "aime24/test.jsonl", {}, 30),
        (LeetCode, "leetcode", {"train_split": None, "max_rows": 50}, 50),
    ],
)
def test_all_rows_of_the_data_sets_themselves(preset, path, options, count):
    assert len(preset(local_path=public_data(path), **options).load().test) == count
