"""Multiple choice out of files of one's own: a list of options in a column, and an answer in one of its spellings."""

import csv
import json

import pytest
from datasets import Dataset

from hybrid_lightning.data import ChatFormat, DemonstrationFormat, FileSource, PlainFormat, Row
from hybrid_lightning.data.choice_options import letter_of, options_of
from hybrid_lightning.errors import DataError
from hybrid_lightning.rewards import MultipleChoice

CITIES = ["Paris", "Rome", "3", "Oslo"]
MMLU = [{"question": f"Capital {n}?", "choices": CITIES, "answer": n} for n in range(4)]
ARC = [{**row, "choices": {"text": CITIES, "label": list("1234")}, "answer": str(n + 1)} for n, row in enumerate(MMLU)]
LISTED = [{"text": city, "label": str(n)} for n, city in enumerate(CITIES)]
ARC_FILES = [{**row, "choices": LISTED, "answer": str(n)} for n, row in enumerate(MMLU)]


def write(folder, rows, kind):
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        as_text = json.dumps if kind == "json.csv" else repr  # of pandas
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(rows[0])
            writer.writerows([as_text(cell) if isinstance(cell, (list, dict)) else cell for cell in row.values()] for row in rows)
    return str(path)


@pytest.mark.parametrize(
    ("rows", "kind"), [(MMLU, "jsonl"), (ARC, "parquet"), (ARC_FILES, "parquet"), (MMLU, "json.csv"), (ARC, "python.csv")]
)
def test_options_follow_the_question_and_the_answer_is_their_letter(tmp_path, rows, kind):
    if kind.endswith("csv") and rows is MMLU:  # where 3 is text, which may be the number or the option that reads 3
        rows = rows[:3]
    found = FileSource(test=write(tmp_path, rows, kind), options_column="choices").load().test
    assert [row.answer for row in found] == list("ABCD")[: len(rows)]
    assert found[1].question == "Capital 1?\n\nA. Paris\nB. Rome\nC. 3\nD. Oslo"
    prompt = ChatFormat().format(found[1])
    assert MultipleChoice(options_column="choices")(["The answer is (B).", "E"], [prompt] * 2) == [1.0, 0.0]


@pytest.mark.parametrize("kind", ["parquet", "python.csv"])
def test_a_template_takes_entries_of_lists(tmp_path, kind):
    mmlu = FileSource(test=write(tmp_path, MMLU, kind), template="{question} {choices[0]} or {choices[3]}?").load().test
    assert mmlu[0].question == "Capital 0? Paris or Oslo?" and mmlu[0].answer == "0"
    arc = FileSource(test=write(tmp_path, ARC, kind), template="{question} {choices[text][1]} ({choices[label][1]})").load().test
    assert arc[2].question == "Capital 2? Rome (2)"


def test_a_whole_list_is_written_as_options(tmp_path):
    source = FileSource(test=write(tmp_path, MMLU, "jsonl"), template="Which?\n{choices}\n{question}", options_column="choices")
    row = source.load().test[2]
    assert row.question == "Which?\nA. Paris\nB. Rome\nC. 3\nD. Oslo\nCapital 2?" and row.answer == "C"
    assert PlainFormat("{choices[1]}: {choices}").format(Row("Q?", columns=MMLU[0])).text.startswith("Rome: A. Paris\nB. Rome\n")
    turns = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    demonstration = DemonstrationFormat(PlainFormat("{chat[0][content]}="), "{chat[1][content]}")
    example = demonstration.format(Row("Q", columns={"chat": turns}))
    assert (example.text, example.completions) == ("1+1=", ("2",))


def test_an_answer_is_taken_out_of_text_first_and_without_its_column_there_is_the_question_alone(tmp_path):
    row = FileSource(test=write(tmp_path, MMLU, "jsonl"), options_column="choices", answer_column=None).load().test[0]
    assert row.answer is None and row.question.endswith("D. Oslo")
    rows = [{"question": "Q?", "choices": CITIES, "answer": "It is #### Rome"}]
    source = FileSource(test=write(tmp_path, rows, "jsonl"), options_column="choices", answer_pattern=r"####\s*(.+)")
    assert source.load().test[0].answer == "B"


def test_answers_as_data_sets_give_them():
    for answer, options, letter in (
        *((answer, CITIES, letter) for answer, letter in {"B": "B", "(B)": "B", "Oslo": "D", "1": "B", 2.0: "C", 3: "D"}.items()),
        ("D", {"text": CITIES, "label": ["D", "C", "B", "A"]}, "A"),  # its own label
        ("2", ["1", "3", "2"], "C"),  # whichever way it is read
    ):
        assert letter_of(answer, *options_of(options)) == letter


def test_what_cannot_be_read_is_named(tmp_path):
    for row, options, message in (
        ({"answer": "Bern"}, {}, r"row 0 .*: answer_column 'answer' is 'Bern', which is not an option; give a letter up to D"),
        ({"answer": "3"}, {}, r"is '3', which may be option C or D; give the letter"),
        ({"choices": "Paris, Rome"}, {}, r"options_column 'choices' must be a list of 2 to 26 options, not 'Paris, Rome'"),
        ({"choices": {"text": CITIES, "label": ["A"]}}, {}, r"has 4 options and 1 labels"),
        ({}, {"options_column": "options"}, r"no column 'options'; correct options_column; the columns are question, choices"),
        ({}, {"template": "{question} {choices[4]}"}, r"column 'choices', which template uses, has no entry \[4\]; it"),
        ({"choices": {"text": CITIES}}, {"template": "{choices[label]}"}, r"has no entry \[label\]; it has \[text\]"),
    ):
        path = write(tmp_path, [{**MMLU[0], **row}], "jsonl")
        with pytest.raises(DataError, match=message) as caught:
            FileSource(test=path, **{"options_column": None if "template" in options else "choices", **options}).load()
        assert "\n" not in str(caught.value)
