"""AMC 2023: 40 problems of AMC 12, reworded so that each answer is a number and no choice."""

from typing import Any, ClassVar

from hybrid_lightning.data.presets.base import PresetSource
from hybrid_lightning.data.presets.cells import cell


class AMC23(PresetSource):
    """Columns `question` and `answer`; for `MathMatch`, to which 27.0 is 27.

    Copies with `problem` (AI-MO/aimo-validation-amc) are read too, and answers that are a letter from A to E.

    Args:
        train_split: As in `PresetSource`.
        validation_split: As in `PresetSource`.
        test_split: As in `PresetSource`.
        **options: Further arguments of `PresetSource`.
    """

    hub_path: ClassVar[str] = "math-ai/amc23"

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
        return cell(columns, "question", "problem"), cell(columns, "answer")
