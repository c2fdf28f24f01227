"""MATH (Hendrycks et al. 2021, arXiv 2103.03874): problems of mathematics competitions with LaTeX answers.

The original, hendrycks/competition_math, was taken down; the copy is the one that verl trains on. MATH-500 are those of the test
split on which Lightman et al. 2023 (arXiv 2305.20050) evaluate: whoever tests on it may train on the other 4,500 too, and a
`Mixture` of the two drops what they have in common.
"""

import re
from typing import Any, ClassVar

from hybrid_lightning.data.presets.base import PresetSource
from hybrid_lightning.data.presets.cells import boxed_cell, cell


class MATH(PresetSource):
    r"""Columns `problem`, `solution` with the answer in its last `\boxed{}`, `level` and `type`; for `MathMatch`.

    Args:
        train_split: As in `PresetSource`.
        validation_split: As in `PresetSource`.
        test_split: As in `PresetSource`.
        **options: Further arguments of `PresetSource`.
    """

    hub_path: ClassVar[str] = "DigitalLearningGmbH/MATH-lighteval"

    def __init__(
        self,
        train_split: str | None = "train",
        validation_split: str | None = None,
        test_split: str | None = "test",
        **options: Any,
    ) -> None:
        super().__init__(train_split=train_split, validation_split=validation_split, test_split=test_split, **options)

    def question_and_answer(self, columns: dict[str, Any]) -> tuple[str, str | None]:
        """The problem, and the answer of its own column or else the last box of the solution."""
        answer = cell(columns, "answer") if "answer" in columns else boxed_cell(columns, "solution")
        return cell(columns, "problem", "question"), _marked(answer)


class MATH500(PresetSource):
    """Columns `problem`, `solution`, `answer`, `subject`, `level` and `unique_id`; for `MathMatch`.

    Args:
        train_split: As in `PresetSource`.
        validation_split: As in `PresetSource`.
        test_split: As in `PresetSource`.
        **options: Further arguments of `PresetSource`.
    """

    hub_path: ClassVar[str] = "HuggingFaceH4/MATH-500"

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
        return cell(columns, "problem", "question"), _marked(cell(columns, "answer"))


def _marked(answer: str) -> str:
    r"""An answer in words, such as `even`, as most rows have it: `\text{even}`, which `MathMatch` compares as words."""
    words = re.fullmatch(r"[A-Za-z][A-Za-z ,'-]*\.?", answer) and re.search(r"[A-Za-z]{3}", answer)
    return rf"\text{{{answer}}}" if words else answer
