r"""`TableSource`: questions and answers from the columns of tables.

The reference answer is often the end of a worked solution, from which `answer_pattern` extracts it. In GSM8K (openai/gsm8k) it
follows `####`, which `GSM8K_ANSWER` matches; in YAML write `answer_pattern: '####\s*(.+)'`.
"""

import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from hybrid_lightning.data.choice_options import letter_of, lettered_options, options_of, parse_cell
from hybrid_lightning.data.conversations import asked_text, is_conversation
from hybrid_lightning.data.source import PromptSource
from hybrid_lightning.data.splitting import Row, Splits, check_fractions, split_rows
from hybrid_lightning.data.tables import Table, has_image, to_text
from hybrid_lightning.data.template import fill_template, template_fields
from hybrid_lightning.errors import ConfigError, DataError, shorten
from hybrid_lightning.shared.user_code import compile_pattern

GSM8K_ANSWER = r"####\s*(.+)"


class TableSource(PromptSource):
    """Base of sources that read tables; a subclass defines where the tables come from.

    Args:
        question_column: Column with the question, or with the turns of a conversation (see `ConversationFormat`); not read if
            a `template` is given.
        answer_column: Column with the reference answer; None if there is none. Numbers are written without an exponent and
            without a fractional part of zero: 5.0 gives "5".
        template: Template that makes the question from columns, such as `"{Body} {Question}"`; `{choices[0]}` is an entry of a
            list.
        options_column: Column with the options of a multiple-choice question, a list in one of the layouts of
            `data/choice_options.py`. They are added to the question, one per line as "A. ...", unless the template uses that
            column. An answer that is a label, a number from 0 or the text of an option becomes the letter that
            `MultipleChoice` needs.
        answer_pattern: Regular expression to search for in the answer column; its one group is the answer.
        max_rows: Read only this many rows of each file or hub split, the first ones; None for all.
        skip_bad_rows: Whether to drop rows without a usable question or answer, and log their number. If false, such a row is an
            error.
        validation_fraction: Share of the training rows that becomes the validation split, if no validation split is given.
        test_fraction: Share of the training rows that becomes the test split, if no test split is given.
        split_seed: Seed of the shuffle that decides which problems these fractions hold out.
        set_column: Column with the name of the row's set. Sets are evaluated separately, and `RewardBySet`, `FormatBySet` and
            `EnvironmentBySet` select by set. `Mixture` names its sources instead.
    """

    def __init__(
        self,
        question_column: str = "question",
        answer_column: str | None = "answer",
        template: str | None = None,
        options_column: str | None = None,
        answer_pattern: str | None = None,
        max_rows: int | None = None,
        skip_bad_rows: bool = False,
        validation_fraction: float = 0.0,
        test_fraction: float = 0.0,
        split_seed: int = 0,
        set_column: str | None = None,
    ) -> None:
        if max_rows is not None and max_rows < 1:
            raise ConfigError(f"max_rows={max_rows}; give at least 1, or null for all rows")
        self._used = [] if template is None else template_fields("template", template)
        if template is not None and not self._used:
            raise ConfigError(f"template={template!r} uses no column; name at least one in braces, such as {{question}}")
        check_fractions(validation_fraction, test_fraction)
        self.question_column = question_column
        self.answer_column = answer_column
        self.template = template
        self.options_column = options_column
        self.answer_pattern = None if answer_pattern is None else compile_pattern(answer_pattern, 1, "answer_pattern", re.NOFLAG)
        if answer_pattern is not None and answer_column is None:
            raise ConfigError(f"answer_pattern={answer_pattern!r} has nothing to search in; set answer_column")
        self.max_rows = max_rows
        self.skip_bad_rows = skip_bad_rows
        self.validation_fraction = validation_fraction
        self.test_fraction = test_fraction
        self.split_seed = split_seed
        self.set_column = set_column

    @abstractmethod
    def read_tables(self) -> dict[str, tuple[str, Table]]:
        """Read the tables: "train", "validation" or "test" -> (where the table comes from, its rows)."""

    def read(self) -> Splits:
        """Read all tables, and split off validation and test rows by the fractions."""
        rows = {split: self._to_rows(source, table) for split, (source, table) in self.read_tables().items()}
        for split, fraction in (("validation", self.validation_fraction), ("test", self.test_fraction)):
            if fraction and split in rows:
                raise ConfigError(f"{split}_fraction={fraction}, but a {split} split is given too; keep one of the two")
            if fraction and "train" not in rows:
                raise ConfigError(f"{split}_fraction={fraction} needs training rows to split from; give a train split")
        if self.validation_fraction or self.test_fraction:
            parts = vars(split_rows(rows["train"], self.validation_fraction, self.test_fraction, self.split_seed))
            rows = {split: rows.get(split) or parts[split] for split in parts} | {"train": parts["train"]}
        return Splits(**rows)

    def _to_rows(self, source: str, table: Table) -> list[Row]:
        table = table[: self.max_rows]
        self._check_columns(source, table)
        rows: list[Row] = []
        bad: list[DataError] = []
        for index, columns in enumerate(table):
            try:
                rows.append(self._to_row(source, index, columns))
            except DataError as error:
                if not self.skip_bad_rows:
                    raise
                bad.append(error)
        if not rows:
            raise DataError(f"{source}: none of the {len(table)} rows can be used; the first: {bad[0]}")
        if bad:
            rank_zero_info(f"{source}: dropped {len(bad)} of {len(table)} rows that cannot be used; the first: {bad[0]}")
        return rows

    def _check_columns(self, source: str, table: Table) -> None:
        existing = dict.fromkeys(column for columns in table for column in columns)
        named = (("answer_column", self.answer_column), ("options_column", self.options_column), ("set_column", self.set_column))
        wanted = [(name, column) for name, column in named if column is not None]
        wanted += [("template", column) for column in self._used] or [("question_column", self.question_column)]
        for name, column in wanted:
            if column not in existing:
                raise DataError(f"{source} has no column {column!r}; correct {name}; the columns are {', '.join(existing)}")

    def _to_row(self, source: str, index: int, columns: dict[str, Any]) -> Row:
        where = f"{source}, row {index} (the first is 0)"
        image = next((name for name, cell in columns.items() if has_image(cell)), None)
        if image is not None:
            raise DataError(
                f"{where}: column {image!r} has an image, but a policy reads only text; remove the column if the question needs "
                "no image, or set skip_bad_rows=true"
            )
        if self.template is None:
            with row_error(f"{where}: question_column {self.question_column!r}"):
                question = _cell_text(columns.get(self.question_column))
        else:
            question = fill_template("template", self.template, {name: columns.get(name) for name in self._used}, where).strip()
            if not question:
                raise DataError(f"{where}: the question made by the template is empty; correct or remove the row")
        answer = None if self.answer_column is None else self._answer(where, columns)
        if self.options_column is not None:
            with row_error(f"{where}: options_column {self.options_column!r}"):
                options = options_of(columns.get(self.options_column))
            if self.options_column not in self._used:
                question = f"{question}\n\n{lettered_options(options[0])}"
            if self.answer_column is not None:
                cell = columns[self.answer_column] if self.answer_pattern is None else answer
                with row_error(f"{where}: answer_column {self.answer_column!r}"):
                    answer = letter_of(cell, *options)
            columns = {**columns, self.options_column: parse_cell(columns[self.options_column])}
        if self.set_column is None:
            return Row(question, answer, index, source, columns)
        with row_error(f"{where}: set_column {self.set_column!r}"):
            return Row(question, answer, index, source, columns, set_name=_cell_text(columns.get(self.set_column)))

    def _answer(self, where: str, columns: dict[str, Any]) -> str:
        assert self.answer_column is not None
        with row_error(f"{where}: answer_column {self.answer_column!r}"):
            text = _cell_text(columns.get(self.answer_column))
        if self.answer_pattern is None:
            return text
        match = self.answer_pattern.search(text)
        answer = (match.group(1) or "").strip() if match else ""
        if not answer:
            raise DataError(
                f"{where}: answer_pattern={self.answer_pattern.pattern!r} finds nothing in {shorten(text)}; correct the pattern "
                "or the row, or set skip_bad_rows=true"
            )
        return answer


@contextmanager
def row_error(place: str) -> Iterator[None]:
    """Turn a ValueError about a cell into a DataError that names its place (a row, with column or class) and the remedy."""
    try:
        yield
    except ValueError as error:
        raise DataError(f"{place} {error}; correct or remove the row, or set skip_bad_rows=true") from error


def _cell_text(cell: Any) -> str:
    text = (asked_text(cell) if is_conversation(cell) else to_text(cell)).strip()
    if not text:
        raise ValueError("is empty")
    return text


def given_splits(splits: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Pairs of the parameter for a split and its value, without values that are None; ConfigError if all are None."""
    given = [(split, value) for split, value in splits if value is not None]
    if not given:
        names = [split for split, _ in splits]
        raise ConfigError(f"no data; set at least one of {', '.join(names)}, as in --data.source.{names[0]}=VALUE")
    return given
