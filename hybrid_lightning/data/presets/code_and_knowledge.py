"""LeetCodeDataset (Xia et al. 2025, arXiv 2504.14655): Python problems with a class to complete, and tests.

MMLU-Pro (Wang et al. 2024, arXiv 2406.01574): questions of 14 subjects with up to ten options.
"""

from typing import Any, ClassVar

from hybrid_lightning.data.options import lettered, options_of
from hybrid_lightning.data.presets.preset_source import PresetSource, cell
from hybrid_lightning.data.values import to_text


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
        try:
            options, _ = options_of(columns.get("options"))
        except ValueError as error:
            raise ValueError(f"column 'options' {error}") from error
        letters = [chr(ord("A") + number) for number in range(len(options))]
        answer = cell(columns, "answer")
        if answer not in letters:
            raise ValueError(f"column 'answer' is {answer!r}, which is no letter of the {len(options)} options")
        index = columns.get("answer_index")
        if index is not None and to_text(index) != str(letters.index(answer)):
            raise ValueError(f"column 'answer' is {answer!r}, but 'answer_index' is {index}")
        return f"{cell(columns, 'question')}\n\n{lettered(options)}", answer
