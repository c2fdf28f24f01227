"""LeetCodeDataset (Xia et al. 2025, arXiv 2504.14655): Python problems with a class to complete, and tests."""

from typing import Any, ClassVar

from hybrid_lightning.data.presets.base import PresetSource
from hybrid_lightning.data.presets.cells import cell


class LeetCode(PresetSource):
    """Columns `query` (the problem with the code to complete), `prompt` (imports), `entry_point`, `test` (a function `check`) and
    `completion` (a solution); for `CodeTests`, whose defaults are these columns.

    The solution is the reference answer: no reward compares with it, but modules can be scored by it, and it can be trained on.

    Args:
        train_split: As in `PresetSource`.
        validation_split: As in `PresetSource`.
        test_split: As in `PresetSource`.
        **options: Further arguments of `PresetSource`.
    """

    hub_path: ClassVar[str] = "newfacade/LeetCodeDataset"

    def __init__(
        self,
        train_split: str | None = "train",
        validation_split: str | None = None,
        test_split: str | None = "test",
        **options: Any,
    ) -> None:
        super().__init__(train_split=train_split, validation_split=validation_split, test_split=test_split, **options)

    def question_and_answer(self, columns: dict[str, Any]) -> tuple[str, str | None]:
        """The problem with the code to complete, and a solution of it."""
        for name in ("test", "entry_point"):
            cell(columns, name)
        return cell(columns, "query"), cell(columns, "completion")
