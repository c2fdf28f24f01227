"""AIME 2024 and 2025: the 30 problems of each year's two papers, whose answers are whole numbers from 0 to 999."""

import re
from typing import Any, ClassVar

from hybrid_lightning.data.presets.base import PresetSource
from hybrid_lightning.data.presets.cells import boxed_cell, cell

# opencompass/AIME2025 has 336^\circ; other copies are made of floats, or keep LaTeX's delimiters.
_AROUND = re.compile(r"\A\$|\^\s*\{?\s*\\circ\s*\}?|\u00b0|\.0+(?=\$?\Z)|\$\Z")


class AIME24(PresetSource):
    r"""Columns `problem` and `answer`; for `MathMatch`, to which 073 is 73.

    Read are other copies too: `Problem` and `Answer` (Maxwell-Jia/AIME_2024), and the answer in the `\boxed{}` of `solution`
    (math-ai/aime24).

    Args:
        train_split: As in `PresetSource`.
        validation_split: As in `PresetSource`.
        test_split: As in `PresetSource`; the hub calls the only split "train".
        **options: Further arguments of `PresetSource`.
    """

    hub_path: ClassVar[str] = "HuggingFaceH4/aime_2024"

    def __init__(
        self,
        train_split: str | None = None,
        validation_split: str | None = None,
        test_split: str | None = "train",
        **options: Any,
    ) -> None:
        super().__init__(train_split=train_split, validation_split=validation_split, test_split=test_split, **options)

    def question_and_answer(self, columns: dict[str, Any]) -> tuple[str, str | None]:
        """The problem and its answer."""
        return _problem(columns)


class AIME25(PresetSource):
    """Columns `problem` and `answer`; for `MathMatch`. Copies with `question` (opencompass/AIME2025) are read too.

    Args:
        train_split: As in `PresetSource`.
        validation_split: As in `PresetSource`.
        test_split: As in `PresetSource`.
        **options: Further arguments of `PresetSource`.
    """

    hub_path: ClassVar[str] = "math-ai/aime25"

    def __init__(
        self,
        train_split: str | None = None,
        validation_split: str | None = None,
        test_split: str | None = "test",
        **options: Any,
    ) -> None:
        super().__init__(train_split=train_split, validation_split=validation_split, test_split=test_split, **options)

    def question_and_answer(self, columns: dict[str, Any]) -> tuple[str, str | None]:
        """The problem and its answer."""
        return _problem(columns)


def _problem(columns: dict[str, Any]) -> tuple[str, str]:
    spelled = any(name in columns for name in ("answer", "Answer"))
    answer = cell(columns, "answer", "Answer") if spelled else boxed_cell(columns, "solution", "Solution")
    number = _AROUND.sub("", answer)
    if not re.fullmatch(r"\d{1,3}", number):
        raise ValueError(f"the answer {answer!r} is no whole number from 0 to 999")
    return cell(columns, "problem", "Problem", "question"), number
