"""Conversations in a column: lists of turns `{"role": ..., "content": ...}`, as data sets on the hub have them.

Two layouts are read. The turns before the answer may have a column of their own, and the answer another:

    {"prompt": [user turn, ...], "completion": [assistant turn]}

or one column holds both, and the last turn is the answer:

    {"messages": [user turn, ..., assistant turn]}
"""

from typing import Any

from hybrid_lightning.data.formatting import PromptFormat, of_row
from hybrid_lightning.data.splitting import Row
from hybrid_lightning.errors import DataError
from hybrid_lightning.types import Prompt

Turn = dict[str, str]


def is_conversation(value: Any) -> bool:
    """Whether a cell is a list of turns, each with a role and a text."""
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in value)
        and all(isinstance(turn.get("content"), str) for turn in value)
    )


def asked_turns(turns: Any) -> tuple[Turn, ...]:
    """The turns before the answer, reduced to role and content."""
    kept = tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)
    return kept[:-1] if kept[-1]["role"] == "assistant" else kept


def without_system(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns without a system turn in front."""
    return turns[1:] if turns and turns[0]["role"] == "system" else turns


def asked_text(turns: Any) -> str:
    """What is asked as one text, which tells conversations apart.

    Example:
        >>> asked_text([{"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "7"}])
        'user: 3+4?'
    """
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in asked_turns(turns))


def answered_text(turns: Any, where: str) -> str:
    """What the assistant says in the last turn.

    Args:
        turns: A conversation, or the answer alone.
        where: Row and column, for error messages.

    Raises:
        DataError: If the last turn is not the assistant's, or an answer has several turns.
    """
    if turns[-1]["role"] != "assistant":
        raise DataError(f"{where} ends with a turn of {turns[-1]['role']!r}, not of 'assistant': correct or remove the row")
    if len(turns) > 1 and turns[0]["role"] == "assistant":
        raise DataError(f"{where} is an answer of {len(turns)} turns; give one assistant turn, or a whole conversation")
    return str(turns[-1]["content"])


class ConversationFormat(PromptFormat):
    """Chat messages out of a column with the turns of a conversation, all but the answer.

    Args:
        column: Its name.
        system_prompt: Instruction in front of the turns, in place of a system turn that they begin with; None for theirs, if any.

    Example:
        >>> turns = [{"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "7"}]
        >>> ConversationFormat(system_prompt="Add.").format(Row("3+4?", columns={"messages": turns})).messages
        ({'role': 'system', 'content': 'Add.'}, {'role': 'user', 'content': '3+4?'})
    """

    def __init__(self, column: str = "messages", system_prompt: str | None = None) -> None:
        super().__init__(system_prompt=system_prompt)
        self.column = column

    def format(self, row: Row) -> Prompt:
        """Take the turns as they are.

        Raises:
            DataError: If the column is missing, holds no list of turns, or nothing is asked.
        """
        where = f"{row.source}, row {row.index}"
        if self.column not in row.columns:
            raise DataError(f"{where} has no column {self.column!r}: correct format.column; it has {', '.join(row.columns)}")
        turns = row.columns[self.column]
        if not is_conversation(turns):
            raise DataError(
                f"{where}: column {self.column!r} must be a list of turns such as "
                '[{"role": "user", "content": "..."}]; for plain text use PlainFormat or ChatFormat'
            )
        messages = asked_turns(turns)
        if not messages:
            raise DataError(f"{where}: column {self.column!r} answers nothing: no turn is before it; correct or remove the row")
        if self.system_prompt:
            # Chat templates know one system turn, if any.
            messages = ({"role": "system", "content": self.system_prompt}, *without_system(messages))
        return Prompt(messages=messages, **of_row(row))
