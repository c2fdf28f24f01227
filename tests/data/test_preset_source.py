"""Presets on rows in the layout of the hub, and on copies in other layouts."""

import json

import hub_contents as hub
import pytest
from preset_rows import CASES, DAPO, DAPO_PROBLEM, REWARDS
from public_data import public_data

from hybrid_lightning.data import AIME24, AIME25, GSM8K, MATH, MATH500, DAPOMath17k, HubSource, LeetCode, preset_source
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


@pytest.mark.parametrize("case", CASES)
def test_a_row_and_its_reward_that_tells_right_from_wrong(case, tmp_path):
    preset, columns, question, answer, *completions = CASES[case]
    (row,) = only_test(preset, write(tmp_path, "test.jsonl", columns))
    assert (row.question, row.answer) == (question, answer) and row.columns == columns and row.index == 0
    prompt = Prompt(text=row.question, answer=row.answer, columns=row.columns)
    scores = REWARDS.get(preset, MathMatch)()
    scores.check_prompt(prompt)
    assert list(scores(completions, [prompt] * 2)) == [1.0, 0.0]


@pytest.mark.parametrize("preset", dict.fromkeys(case[0] for case in CASES.values()))
def test_what_is_asked_of_the_hub(preset, monkeypatch):
    asked = []

    def read(parameter, split, path, name, revision, max_rows):
        asked.append((parameter, revision, max_rows))
        return next(rows for file, rows in hub.DATA_SETS[path].items() if split in file and (name or "") in file)[:max_rows]

    monkeypatch.setattr(preset_source, "read_hub_split", read)
    splits = preset(revision="v1", max_rows=7).load()
    assert asked == [(f"{use}_split", "v1", 7) for use in preset.splits]
    for use, split in preset.splits.items():
        assert {row.source for row in getattr(splits, use)} == {f"{preset.hub_path} {split}"}


def test_a_clone_of_the_repository(tmp_path):
    rows = [{"question": f"q{n}", "answer": f"#### {n}"} for n in range(6)]
    write(tmp_path, "main/train-00000-of-00002.jsonl", *rows[:2])
    write(tmp_path, "main/train-00001-of-00002.jsonl", *rows[2:4])
    write(tmp_path, "main/test-00000-of-00001.jsonl", *rows[4:])
    write(tmp_path, "socratic/train-00000-of-00001.jsonl", {"question": "socratic", "answer": "#### 1"})
    splits = GSM8K(local_path=str(tmp_path)).load()
    assert [row.question for row in splits.train] == ["q0", "q1", "q2", "q3"]
    assert [row.answer for row in splits.test] == ["4", "5"]
    assert splits.train[0].source == str(tmp_path / "main") and splits.test[0].source.endswith("test-00000-of-00001.jsonl")


@pytest.mark.parametrize("whole", ["", "data/"])
def test_subsets_in_a_clone_do_not_repeat_the_whole(tmp_path, whole):
    rows = [{"problem": f"p{n}", "solution": rf"\boxed{{{n}}}"} for n in range(4)]
    write(tmp_path, f"{whole}train.jsonl", *rows)
    write(tmp_path, "algebra/train.jsonl", *rows[:2])
    assert len(MATH(local_path=str(tmp_path), test_split=None).load().train) == 4


def test_the_only_file_serves_the_only_split_whatever_its_name(tmp_path):
    row = CASES["aime24"][1]
    for name in ("aime", "train"):
        path = write(tmp_path / name, f"{name}.jsonl", row)
        write(tmp_path / name, f".cache/{name}.jsonl", row)  # as the hub's library leaves it
        assert len(AIME24(local_path=path).load().test) == len(AIME24(local_path=str(tmp_path / name)).load().test) == 1


def test_problems_of_dapo_are_kept_once_in_three_subsets_and_presets_are_no_hub_sources(tmp_path):
    row = CASES["dapo original"][1]
    other = {**row, "prompt": [{"role": "user", "content": DAPO.format("Another one.")}]}
    path = write(tmp_path, "dapo-math-17k.jsonl", row, other, row, row)
    splits = DAPOMath17k(local_path=path).load()
    assert [(row.question, row.index) for row in splits.train] == [(DAPO_PROBLEM, 0), ("Another one.", 1)]
    # A config that changes from one to the other inherits arguments of the same name: `path` must be none of them
    assert not isinstance(GSM8K(), HubSource) and not hasattr(GSM8K(), "path")
    assert DAPOMath17k(subset="en").hub_name == "en" and DAPOMath17k().hub_name is None
    with pytest.raises(ConfigError, match="subset='fr'; give one of all, en, cn"):
        DAPOMath17k(subset="fr")


def test_a_bad_row_is_named_or_skipped(tmp_path):
    for case, change, message in (
        ("gsm8k", {"answer": "no mark"}, "column 'answer' has no answer after ####: 'no mark'"),
        ("math", {"solution": "no box"}, r"the solution has no \\boxed\{\} with an answer"),
        ("aime25", {"answer": 1000}, "'1000' is not a whole number from 0 to 999"),
        ("mmlu_pro", {"answer": "K"}, "column 'answer' is 'K', which is not the letter of one of the 10 options"),
        ("dapo", {"reward_model": "x"}, "column 'reward_model' is not JSON"),
        ("dapo", {"reward_model": {}}, "there is no column 'ground_truth'"),
        ("leetcode", {"test": ""}, "column 'test' is empty"),
    ):
        preset, columns, *_ = CASES[case]
        path = write(tmp_path, "test.jsonl", columns, {**columns, **change})
        with pytest.raises(DataError, match=rf"test\.jsonl, row 1 .*: {preset.__name__}: .*{message}.*skip_bad_rows"):
            only_test(preset, path)
        assert len(only_test(preset, path, skip_bad_rows=True)) == 1


def test_what_copies_put_around_an_answer_of_aime_is_left_out(tmp_path):
    rows = [{"question": f"{n}?", "answer": answer} for n, answer in enumerate((r"336^\circ", "336\u00b0", 336.0, "$336.0$"))]
    assert [row.answer for row in only_test(AIME25, write(tmp_path, "test.jsonl", *rows))] == ["336"] * 4


def test_an_answer_of_math_in_words_is_one_that_can_be_compared_with(tmp_path):
    for preset, answer in ((MATH, "No roots"), (MATH500, "Tuesday.")):
        row = {"problem": "?", "solution": rf"It is $\boxed{{{answer}}}$.", "answer": answer}
        prompt = Prompt(text="?", answer=only_test(preset, write(tmp_path, "test.jsonl", row))[0].answer)
        MathMatch().check_prompt(prompt)
        texts = [row["solution"], r"\boxed{odd}", rf"\boxed{{\text{{{answer}}}}}"]
        assert MathMatch()(texts, [prompt] * 3) == [1.0, 0.0, 1.0]


def test_what_cannot_be_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "test.jsonl", CASES["gsm8k"][1])
    for arguments, error, message in (
        ({"local_path": "nowhere"}, DataError, "local_path='nowhere' does not exist"),
        ({"local_path": "."}, DataError, "no file for train_split='train'; name one train.jsonl, .* the files are test.jsonl"),
        ({"local_path": ".", "train_split": "train[:5]"}, ConfigError, r"train_split='train\[:5\]': slices work only on the hub"),
    ):
        with pytest.raises(error, match=message):
            GSM8K(**arguments).load()


def test_the_last_box():
    nested = r"\left\{\frac{1}{2}\right\}"
    boxes = {r"\boxed{1} and \boxed{2}": "2", rf"$\boxed{{{nested}}}$": nested, r"$\boxed 7$.": "7", r"\fbox{ 3 }": "3"}
    for text, answer in {**boxes, r"\boxed{1} \boxed{2": "1", "none": None}.items():
        assert last_boxed(text) == answer


def test_all_rows_of_the_data_sets_themselves():
    for preset, path, options, count in (
        (GSM8K, "gsm8k", {}, 1319),
        (AIME24, "aime24/test.jsonl", {}, 30),
        (LeetCode, "leetcode", {"train_split": None, "max_rows": 50}, 50),
    ):
        assert len(preset(local_path=public_data(path), **options).load().test) == count
