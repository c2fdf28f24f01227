"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): grade-school word problems, whose answers are whole numbers."""

from typing import Any, ClassVar

from hybrid_lightning.data.presets.base import PresetSource
from hybrid_lightning.data.presets.cells import cell
from hybrid_lightning.data.values import shorten


class GSM8K(PresetSource):
    """Columns `question` and `answer`, a worked solution in which the answer follows `####`; for `MathMatch`.

    Args:
        train_split: As in `PresetSource`.
        validation_split: As in `PresetSource`.
        test_split: As in `PresetSource`.
        **options: Further arguments of `PresetSource`.
    """

    hub_path: ClassVar[str] = "openai/gsm8k"
    hub_name = "main"

    def __init__(
        self,
        train_split: str | None = "train",
        validation_split: str | None = None,
        test_split: str | None = "test",
        **options: Any,
    ) -> None:
        super().__init__(train_split=train_split, validation_split=validation_split, test_split=test_split, **options)

    def question_and_answer(self, columns: dict[str, Any]) -> tuple[str, str | None]:
        """The question, and what follows the last `####`."""
        solution = cell(columns, "answer")
        answer = solution.rpartition("####")[2].strip() if "####" in solution else ""
        if not answer:
            raise ValueError(f"column 'answer' has no answer after ####: {shorten(solution)}")
        return cell(columns, "question"), answer
