r"""Formats of training examples: a prompt together with its completions from the data.

They wrap the format of the prompt, plain or chat. A completion is a template over the row's columns, such as `"{completion}"` or
`" {answer}"`; a column with a conversation stands for the text of the assistant's last turn. The policy appends the end marker
(the chat template's, or the end-of-sequence token) and learns it too.

| rows | prompt | completions |
|---|---|---|
| `{"prompt": "3+4=", "completion": "7"}` | `PlainFormat("{prompt}")` | `"{completion}"` |
| `{"prompt": [turns], "completion": [turn]}` | `ConversationFormat("prompt")` | `"{completion}"` |
| `{"messages": [turns, the last the answer]}` | `ConversationFormat("messages")` | `"{messages}"` |
| `{"prompt": "3+4=", "chosen": "7", "rejected": "8"}` | `PlainFormat("{prompt}")` | `"{chosen}"`, `"{rejected}"` |
| `{"chosen": [turns], "rejected": [turns]}` | `ConversationFormat("chosen")` | `"{chosen}"`, `"{rejected}"` |

The source needs a question that identifies the problem: set `question_column: prompt` (or `messages`, or `chosen`), and
`answer_column: null` unless there is an answer that a reward can check.
"""

from dataclasses import replace

from hybrid_lightning.data.conversations import answered_text, asked_turns, is_conversation, without_system
from hybrid_lightning.data.formatting import PlainFormat, PromptFormat
from hybrid_lightning.data.splitting import Row
from hybrid_lightning.data.template import fill_template, template_fields
from hybrid_lightning.errors import ConfigError, DataError
from hybrid_lightning.types import Prompt


class ExampleFormat(PromptFormat):
    """Base of the formats of examples: a prompt with its completions.

    Args:
        prompt: Format of the prompt; None takes `PlainFormat()`.
        completions: Name of the parameter that gives a template -> template of a completion.
    """

    def __init__(self, prompt: PromptFormat | None, completions: dict[str, str]) -> None:
        super().__init__()
        self.prompt = prompt or PlainFormat()
        self.completions = completions
        for name, template in completions.items():
            if not template_fields(name, template):
                raise ConfigError(f"{name}={template!r} uses no column, so all examples would end alike; name one in braces")

    def format(self, row: Row) -> Prompt:
        """Format the prompt and fill in the completions.

        Raises:
            ConfigError: If a template names a column that the row does not have.
            DataError: If a completion is empty, or belongs to another conversation than the prompt.
        """
        prompt = self.prompt.format(row)
        return replace(prompt, completions=tuple(self._completion(row, prompt, *item) for item in self.completions.items()))

    def _completion(self, row: Row, prompt: Prompt, name: str, template: str) -> str:
        where = row.place
        values = {**row.columns, "question": row.question}
        for column in template_fields(name, template):
            turns = values.get(column)
            entry_taken = f"{{{column}[" in template  # an entry is used unchanged
            if entry_taken or not is_conversation(turns):
                continue
            values[column] = answered_text(turns, f"{where}: column {column!r}")
            context = without_system(asked_turns(turns))  # the prompt's format may have replaced the system turn
            if context and context != (prompt.messages or ())[-len(context) :]:
                raise DataError(
                    f"{where}: column {column!r} answers other turns than the prompt's; correct or remove the row, or set "
                    "data.format.prompt to the column with the turns before the answer"
                )
        text = fill_template(name, template, values, where)
        if not text.strip():
            raise DataError(f"{where}: the completion that {name}={template!r} makes is empty; correct or remove the row")
        return text


class DemonstrationFormat(ExampleFormat):
    """A prompt with the completion to learn, for supervised fine-tuning.

    Args:
        prompt: Format of the prompt; None takes `PlainFormat()`.
        completion: Template of the completion, with columns in braces.

    Example:
        >>> row = Row("3+4=", columns={"completion": "7"})
        >>> example = DemonstrationFormat().format(row)
        >>> example.text, example.completions
        ('3+4=', ('7',))
    """

    def __init__(self, prompt: PromptFormat | None = None, completion: str = "{completion}") -> None:
        super().__init__(prompt, {"completion": completion})


class PreferenceFormat(ExampleFormat):
    """A prompt with a preferred and a rejected completion, for DPO.

    Args:
        prompt: Format of the prompt; None takes `PlainFormat()`.
        chosen: Template of the preferred completion, with columns in braces.
        rejected: Template of the other completion, with columns in braces.

    Example:
        >>> row = Row("3+4=", columns={"chosen": "7", "rejected": "8"})
        >>> PreferenceFormat().format(row).completions
        ('7', '8')
    """

    def __init__(self, prompt: PromptFormat | None = None, chosen: str = "{chosen}", rejected: str = "{rejected}") -> None:
        super().__init__(prompt, {"chosen": chosen, "rejected": rejected})

    def format(self, row: Row) -> Prompt:
        """Format the prompt and fill in the completions.

        Raises:
            ConfigError: As in `ExampleFormat`.
            DataError: As in `ExampleFormat`, or if both completions are the same.
        """
        prompt = super().format(row)
        chosen, rejected = prompt.completions
        if chosen == rejected:
            raise DataError(
                f"{row.place}: the chosen and the rejected completion are the same ({chosen[:60]!r}); correct or remove the row"
            )
        return prompt
