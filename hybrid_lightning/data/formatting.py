r"""`PromptFormat`: turns a row into a prompt, the class that a config swaps between plain text and chat messages.

A template is text with the names of columns in braces: `"{question}\nAnswer:"`. It may use every column of the row, and
`{question}` is the question as the source made it. Write `{{` and `}}` for literal braces: `\boxed{{}}`.

`FormatBySet` gives each set of a mixture its own format.
"""

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import Any

from hybrid_lightning.data.splitting import Row
from hybrid_lightning.data.tables import read_table
from hybrid_lightning.data.template import fill_template, template_fields
from hybrid_lightning.errors import ConfigError, DataError
from hybrid_lightning.shared.configurable import Configurable
from hybrid_lightning.types import Prompt

# Not Any: the command line would parse such text as YAML, and read "Add: 1" as a mapping.
_Value = str | bool | int | float | None
FewShot = list[dict[str, _Value | list[_Value | dict[str, _Value]] | dict[str, _Value]]] | str | None  # rows, or a file with rows


class PromptFormat(Configurable, ABC):
    """Turns rows into prompts.

    Args:
        template: Text of the question, with columns in braces.
        system_prompt: Instruction before everything else, used unchanged; None for no instruction.
        few_shot: Solved examples before the question: a list of rows such as `{"question": "1+1=", "answer": "2"}`, or the
            path of a file with such rows (JSONL, JSON, CSV or Parquet). They need the columns that `template` and
            `answer_template` use.
        answer_template: Template of the answer of an example.
    """

    def __init__(
        self,
        template: str = "{question}",
        system_prompt: str | None = None,
        few_shot: FewShot = None,
        answer_template: str = "{answer}",
    ) -> None:
        fields = template_fields("template", template)
        if not fields:
            raise ConfigError(f"template={template!r} uses no column, so all prompts would be the same; add {{question}}")
        if "answer" in fields:
            raise ConfigError(f"template={template!r} would show the reference answer to the policy; remove {{answer}}")
        template_fields("answer_template", answer_template)
        self.template = template
        self.system_prompt = system_prompt
        self.answer_template = answer_template
        examples = read_table("few_shot", few_shot) if isinstance(few_shot, str) else few_shot or []
        self.examples = [self._example(number, example) for number, example in enumerate(examples)]

    @abstractmethod
    def format(self, row: Row) -> Prompt:
        """Make the prompt of a row; it keeps everything else that the row has."""

    def question(self, row: Row) -> str:
        """Fill the template of the question with a row."""
        values = {**row.columns, "question": row.question}
        return fill_template("template", self.template, values, row.place)

    def _example(self, number: int, example: dict[str, Any]) -> tuple[str, str]:
        where = f"few_shot example {number} (the first is 0)"
        question = fill_template("template", self.template, example, where)
        return question, fill_template("answer_template", self.answer_template, example, where)


class PlainFormat(PromptFormat):
    r"""Prompts of plain text, as base models and few-shot prompting need them.

    Args:
        template: As in `PromptFormat`; the completion begins right after it.
        system_prompt: As in `PromptFormat`.
        few_shot: As in `PromptFormat`.
        answer_template: Text that follows the template in an example; begin it with a space if completions should begin with one.
        separator: Text between system prompt, examples and question.

    Example:
        >>> plain = PlainFormat("Q: {question}\nA:", few_shot=[{"question": "1+1", "answer": 2}])
        >>> plain.format(Row("3+4", "7")).text
        'Q: 1+1\nA: 2\n\nQ: 3+4\nA:'
    """

    def __init__(
        self,
        template: str = "{question}",
        system_prompt: str | None = None,
        few_shot: FewShot = None,
        answer_template: str = " {answer}",
        separator: str = "\n\n",
    ) -> None:
        super().__init__(template, system_prompt, few_shot, answer_template)
        self.separator = separator

    def format(self, row: Row) -> Prompt:
        """Join system prompt, examples and question."""
        pieces = [self.system_prompt] if self.system_prompt else []
        pieces += [question + answer for question, answer in self.examples]
        text = self.separator.join([*pieces, self.question(row)])
        return Prompt(text=text, **prompt_fields(row))


class ChatFormat(PromptFormat):
    """Prompts as chat messages, which the policy renders with its chat template; examples become earlier turns.

    Example:
        >>> ChatFormat(system_prompt="Add.").format(Row("3+4", "7")).messages
        ({'role': 'system', 'content': 'Add.'}, {'role': 'user', 'content': '3+4'})
    """

    def format(self, row: Row) -> Prompt:
        """Write system prompt, examples and question as turns."""
        turns = [("system", self.system_prompt)] if self.system_prompt else []
        for question, answer in self.examples:
            turns += [("user", question), ("assistant", answer)]
        turns.append(("user", self.question(row)))
        messages = tuple({"role": role, "content": content} for role, content in turns)
        return Prompt(messages=messages, **prompt_fields(row))


class FormatBySet(PromptFormat):
    r"""Gives each set its own format, such as mathematics with the answer in `\boxed{}`, code in a block of Python.

    Args:
        formats: Name of the set, as in the source `Mixture` -> its format.

    Raises:
        ConfigError: If no set is given.
    """

    def __init__(self, formats: dict[str, PromptFormat]) -> None:
        super().__init__()
        if not formats:
            raise ConfigError("FormatBySet: formats={}; give each set a format, as in formats: {gsm8k: ChatFormat}")
        self.formats = formats

    def format(self, row: Row) -> Prompt:
        """Make the prompt of a row with the format of its set.

        Raises:
            DataError: If the set has no format.
        """
        if row.set_name not in self.formats:
            raise DataError(
                f"FormatBySet: {row.place} belongs to set {row.set_name!r}, which has no format; the sets with a format are "
                f"{', '.join(self.formats)}; use the set names of the data source"
            )
        return self.formats[row.set_name].format(row)


def prompt_fields(row: Row) -> dict[str, Any]:
    """Fields of a row that its prompt keeps: all except the fields that identify the problem."""
    return {field.name: getattr(row, field.name) for field in fields(row) if field.name not in ("question", "task")}
