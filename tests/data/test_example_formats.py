"""Demonstrations and preferences out of rows, plain and conversational, and what is wrong with bad ones."""

import json

import pytest

from hybrid_lightning.data import ChatFormat, ConversationFormat, DemonstrationFormat, FileSource, PlainFormat, PreferenceFormat
from hybrid_lightning.data.splitting import Row
from hybrid_lightning.errors import ConfigError, DataError

USER, BOT = {"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "7"}
OTHER = {"role": "assistant", "content": "8"}
TORN = {"chosen": [USER, BOT], "rejected": [{"role": "user", "content": "5+5?"}, BOT]}


def row(**columns):
    return Row(str(columns.get("prompt", "q")), index=5, source="rows.jsonl", columns=columns)


def test_a_plain_demonstration_keeps_the_row_and_uses_a_column():
    example = DemonstrationFormat(PlainFormat("{prompt} ="), " {completion} ({n})").format(row(prompt="3", completion="7", n=2.0))
    assert (example.text, example.completions) == ("3 =", (" 7 (2)",))
    assert (example.index, example.source, example.columns["n"]) == (5, "rows.jsonl", 2.0)
    with pytest.raises(ConfigError, match="chosen='yes' uses no column"):
        PreferenceFormat(chosen="yes")


def test_conversations():
    for columns, column, completion in [
        ({"prompt": [USER], "completion": [BOT]}, "prompt", "{completion}"),
        ({"messages": [USER, BOT]}, "messages", "{messages}"),
    ]:
        example = DemonstrationFormat(ConversationFormat(column), completion).format(row(**columns))
        assert example.messages == (USER,) and example.completions == ("7",)


def test_preferences():
    for columns, prompt in (
        ({"prompt": "3+4?", "chosen": "7", "rejected": "8"}, ChatFormat("{prompt}")),
        ({"prompt": [USER], "chosen": [BOT], "rejected": [OTHER]}, ConversationFormat("prompt")),
        ({"chosen": [USER, BOT], "rejected": [USER, OTHER]}, ConversationFormat("rejected", "Add.")),
    ):
        example = PreferenceFormat(prompt).format(row(**columns))
        assert example.messages[-1] == USER and example.completions == ("7", "8")


def test_bad_rows():
    for format, columns, error, message in (
        (DemonstrationFormat(), {"answer": "7"}, ConfigError, "uses {completion}, which rows.jsonl, row 5 does not have; it has"),
        (DemonstrationFormat(), {"completion": "  "}, DataError, "row 5: the completion that completion=.* makes is empty"),
        (DemonstrationFormat(), {"completion": [USER]}, DataError, "ends with a turn of 'user', not 'assistant'"),
        (DemonstrationFormat(), {"completion": [BOT, USER, BOT]}, DataError, "is an answer of 3 turns; give one"),
        (DemonstrationFormat(ConversationFormat("prompt")), {"prompt": "hi"}, DataError, "must be a list of turns"),
        (DemonstrationFormat(ConversationFormat("m")), {"m": [BOT]}, DataError, "has no turn before the answer"),
        (PreferenceFormat(ConversationFormat("chosen")), TORN, DataError, "'rejected' answers other turns than the prompt's"),
        (PreferenceFormat(), {"chosen": "7", "rejected": "7"}, DataError, "the chosen and the rejected completion are the same"),
    ):
        with pytest.raises(error, match=message):
            format.format(row(**columns))


def test_a_file_of_conversations_is_split_by_what_is_asked(tmp_path):
    rows = [{"messages": [{**USER, "content": f"{n}+1?"}, {**BOT, "content": answer}]} for n in range(10) for answer in "78"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = {"question_column": "messages", "answer_column": None}
    splits = FileSource(str(tmp_path / "rows.jsonl"), **columns, validation_fraction=0.3, split_seed=1).load()
    assert splits.train[0].question.startswith("user: ") and "assistant" not in splits.train[0].question
    asked = [{row.question for row in part} for part in (splits.train, splits.validation)]
    assert len(asked[0]) == 7 and len(asked[1]) == 3 and not asked[0] & asked[1]


def test_a_system_prompt_takes_the_place_of_one_that_the_row_has():
    turns = [{"role": "system", "content": "Be nice."}, USER, BOT]
    example = DemonstrationFormat(ConversationFormat("messages", system_prompt="Add."), "{messages}").format(row(messages=turns))
    assert example.messages == ({"role": "system", "content": "Add."}, USER) and example.completions == (BOT["content"],)
    assert ConversationFormat("messages").format(row(messages=turns)).messages == tuple(turns[:2])
