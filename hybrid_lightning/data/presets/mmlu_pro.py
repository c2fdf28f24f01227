"""MMLU-Pro (Wang et al. 2024, arXiv 2406.01574): questions of 14 subjects with up to ten options."""

from collections.abc import Sequence
from typing import Any, ClassVar

from hybrid_lightning.data.presets.base import PresetSource
from hybrid_lightning.data.presets.cells import cell
from hybrid_lightning.data.values import shorten, to_text


class MMLUPro(PresetSource):
    r"""Columns `question`, `options` (a list), `answer` (a letter), `answer_index` and `category`; for `MultipleChoice`.

    The options are part of the question, one a line, as "A. ...". There is no training split: hold out a part of the test split
    for evaluation by `train_split: test`, `test_split: null` and `test_fraction`.

    Args:
        train_split: As in `PresetSource`.
        validation_split: As in `PresetSource`.
        test_split: As in `PresetSource`.
        **options: Further arguments of `PresetSource`.
    """

    hub_path: ClassVar[str] = "TIGER-Lab/MMLU-Pro"

    def __init__(
        self,
        train_split: str | None = None,
        validation_split: str | None = "validation",
        test_split: str | None = "test",
        **options: Any,
    ) -> None:
        super().__init__(train_split=train_split, validation_split=validation_split, test_split=test_split, **options)

    def question_and_answer(self, columns: dict[str, Any]) -> tuple[str, str | None]:
        """The question with its options, and the letter of the right one."""
        options = columns.get("options")
        if not isinstance(options, Sequence) or isinstance(options, str) or not 2 <= len(options) <= 26:
            raise ValueError(f"column 'options' must be a list of 2 to 26 options, not {shorten(options)}")
        for option in options:
            if not isinstance(option, (str, int, float)):
                raise ValueError(f"column 'options' must hold texts or numbers, not {shorten(option)}")
        letters = [chr(ord("A") + number) for number in range(len(options))]
        answer = cell(columns, "answer")
        if answer not in letters:
            raise ValueError(f"column 'answer' is {answer!r}, which is no letter of the {len(options)} options")
        index = columns.get("answer_index")
        if index is not None and to_text(index) != str(letters.index(answer)):
            raise ValueError(f"column 'answer' is {answer!r}, but 'answer_index' is {index}")
        lines = [f"{letter}. {to_text(option).strip()}" for letter, option in zip(letters, options, strict=True)]
        return "\n".join([cell(columns, "question"), "", *lines]), answer
