import pytest

from hybrid_lightning.data import ChatFormat, PlainFormat, Row
from hybrid_lightning.errors import ConfigError, DataError

ROW = Row("How many {birds}?", "12", index=7, source="zoo.jsonl", columns={"question": "raw", "hint": "count", "n": 3.0})
SHOTS = [{"question": "1+1", "answer": 2.0}, {"question": "2+2", "answer": "4"}]


def test_plain_keeps_the_row_and_may_begin_with_examples():
    prompt = PlainFormat().format(ROW)
    assert prompt.text == "How many {birds}?" and prompt.messages is None
    assert (prompt.answer, prompt.index, prompt.source, prompt.columns) == ("12", 7, "zoo.jsonl", ROW.columns)
    plain = PlainFormat("Q: {question} ({n})\nA:", "Solve.", [{**shot, "n": 1} for shot in SHOTS], separator="\n--\n")
    want = "Solve.\n--\nQ: 1+1 (1)\nA: 2\n--\nQ: 2+2 (1)\nA: 4\n--\nQ: How many {birds}? (3)\nA:"
    assert plain.format(ROW).text == want
    with pytest.raises(ConfigError, match=r"uses \{level\}, which zoo.jsonl, row 7 does not have; it has hint, n, question"):
        PlainFormat("{question} {level}").format(ROW)
    with pytest.raises(DataError, match=r"zoo\.jsonl, row 7: column 'hint', which template uses, is missing"):
        PlainFormat("{question} {hint}").format(Row("q", "1", 7, "zoo.jsonl", {"hint": None}))


def test_chat_few_shot_from_a_file(tmp_path):
    path = tmp_path / "shots.csv"
    path.write_text("question,answer,hint\n1+1,2,add\n")
    chat = ChatFormat("{hint}: {question} Use \\boxed{{}}.", "Be {kind}.", str(path), answer_template="\\boxed{{{answer}}}")
    assert chat.format(ROW).messages == (
        {"role": "system", "content": "Be {kind}."},
        {"role": "user", "content": "add: 1+1 Use \\boxed{}."},
        {"role": "assistant", "content": "\\boxed{2}"},
        {"role": "user", "content": "count: How many {birds}? Use \\boxed{}."},
    )
    with pytest.raises(ConfigError, match=r"uses \{kind\}, which few_shot example 0"):
        ChatFormat("{kind}: {question}", few_shot=str(path))


def test_bad_templates():
    for arguments, message in (
        ({"template": "{question} {answer}"}, "would show the reference answer"),
        ({"template": "{question} \\boxed{}"}, "write {{ and }}"),
        ({"template": "{question!r}"}, "nothing else"),
        ({"few_shot": [{"question": "a"}]}, r"answer_template=' \{answer\}' uses \{answer\}, which few_shot example 0"),
        ({"few_shot": [SHOTS[0], {"answer": "a"}]}, r"template='\{question\}' uses \{question\}, which few_shot example 1"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            PlainFormat(**arguments)
        assert "\n" not in str(caught.value)
