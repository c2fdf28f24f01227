"""Conversations in a column: lists of turns `{"role": ..., "content": ...}`, as data sets on the hub have them.

Two layouts are read. Either the answer has its own column, next to the column with the turns before it:

    {"prompt": [user turn, ...], "completion": [assistant turn]}

or one column holds the whole conversation, and its last turn is the answer:

    {"messages": [user turn, ..., assistant turn]}
"""

from typing import Any

from hybrid_lightning.data.formatting import PromptFormat, prompt_fields
from hybrid_lightning.data.splitting import Row
from hybrid_lightning.errors import DataError
from hybrid_lightning.types import Prompt

Turn = dict[str, str]  # role and content


class ConversationFormat(PromptFormat):
    """Uses the turns of a conversation in a column as chat messages, without the answer.

    Args:
        column: Name of the column.
        system_prompt: Instruction before the turns; replaces a system turn at their beginning. None keeps the original one.

    Example:
        >>> turns = [{"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "7"}]
        >>> ConversationFormat(system_prompt="Add.").format(Row("3+4?", columns={"messages": turns})).messages
        ({'role': 'system', 'content': 'Add.'}, {'role': 'user', 'content': '3+4?'})
    """

    def __init__(self, column: str = "messages", system_prompt: str | None = None) -> None:
        super().__init__(system_prompt=system_prompt)
        self.column = column

    def format(self, row: Row) -> Prompt:
        """Make the prompt of a row from its turns, unchanged.

        Raises:
            DataError: If the column is missing or does not hold a list of turns, or if the conversation has no question.
        """
        where = row.place
        if self.column not in row.columns:
            raise DataError(f"{where} has no column {self.column!r}; correct format.column; it has {', '.join(row.columns)}")
        turns = row.columns[self.column]
        if not is_conversation(turns):
            raise DataError(
                f"{where}: column {self.column!r} must be a list of turns such as "
                '[{"role": "user", "content": "..."}]; for plain text use PlainFormat or ChatFormat'
            )
        messages = asked_turns(turns)
        if not messages:
            raise DataError(f"{where}: column {self.column!r} has no turn before the answer; correct or remove the row")
        if self.system_prompt:
            # Chat templates allow at most one system turn.
            messages = ({"role": "system", "content": self.system_prompt}, *without_system(messages))
        return Prompt(messages=messages, **prompt_fields(row))


def is_conversation(value: Any) -> bool:
    """Whether a cell is a conversation: a list of turns, each with a role and a text."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("role", "content")) for turn in value)


def asked_turns(turns: Any) -> tuple[Turn, ...]:
    """Turns before the answer, each reduced to role and content."""
    kept = tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)
    return kept[:-1] if kept[-1]["role"] == "assistant" else kept


def asked_text(turns: Any) -> str:
    """Turns before the answer as one text, which serves as the question that identifies the problem.

    Example:
        >>> asked_text([{"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "7"}])
        'user: 3+4?'
    """
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in asked_turns(turns))


def answered_text(turns: Any, where: str) -> str:
    """Text of the answer: the last turn of a conversation, or its only turn. `where` names the row in error messages.

    Raises:
        DataError: If the last turn is not the assistant's, or an answer alone has several turns.
    """
    if turns[-1]["role"] != "assistant":
        raise DataError(f"{where} ends with a turn of {turns[-1]['role']!r}, not 'assistant'; correct or remove the row")
    if len(turns) > 1 and turns[0]["role"] == "assistant":
        raise DataError(f"{where} is an answer of {len(turns)} turns; give one assistant turn, or a whole conversation")
    return str(turns[-1]["content"])


def without_system(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Turns without a leading system turn."""
    return turns[1:] if turns and turns[0]["role"] == "system" else turns
