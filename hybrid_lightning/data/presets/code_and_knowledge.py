"""Data sets of programming problems and of knowledge questions.

- LeetCodeDataset (Xia et al. 2025, arXiv 2504.14655): Python problems with a class to complete, and tests.
- MMLU-Pro (Wang et al. 2024, arXiv 2406.01574): questions of 14 subjects with up to ten options.
"""

from typing import Any, ClassVar

from hybrid_lightning.data.choice_options import lettered_options, option_letter, options_of
from hybrid_lightning.data.presets.preset_source import PresetSource, cell_text
from hybrid_lightning.data.values import to_text


class LeetCode(PresetSource):
    """LeetCodeDataset, for the reward `CodeTests`, whose defaults are its columns.

    Columns: `query` (the problem with the code to complete), `prompt` (imports), `entry_point`, `test` (a function `check`) and
    `completion` (a solution). The solution is the reference answer: no reward compares with it, but modules can be scored with
    it, and it can be trained on.
    """

    hub_path: ClassVar[str] = "newfacade/LeetCodeDataset"
    splits: ClassVar[dict[str, str]] = {"train": "train", "test": "test"}

    def question_and_answer(self, columns: dict[str, Any]) -> tuple[str, str | None]:
        """Problem with the code to complete, and a solution."""
        for name in ("test", "entry_point"):
            cell_text(columns, name)
        return cell_text(columns, "query"), cell_text(columns, "completion")


class MMLUPro(PresetSource):
    """MMLU-Pro, for the reward `MultipleChoice`.

    Columns: `question`, `options` (a list), `answer` (a letter), `answer_index` and `category`. The options become part of the
    question, one per line as "A. ...". There is no training split: to train on the test split and hold out a part of it, set
    `train_split: test`, `test_split: null` and `test_fraction`.
    """

    hub_path: ClassVar[str] = "TIGER-Lab/MMLU-Pro"
    splits: ClassVar[dict[str, str]] = {"validation": "validation", "test": "test"}

    def question_and_answer(self, columns: dict[str, Any]) -> tuple[str, str | None]:
        """Question with its options, and the letter of the correct one."""
        try:
            options, _ = options_of(columns.get("options"))
        except ValueError as error:
            raise ValueError(f"column 'options' {error}") from error
        letters = [option_letter(number) for number in range(len(options))]
        answer = cell_text(columns, "answer")
        if answer not in letters:
            raise ValueError(f"column 'answer' is {answer!r}, which is no letter of the {len(options)} options")
        index = columns.get("answer_index")
        if index is not None and to_text(index) != str(letters.index(answer)):
            raise ValueError(f"column 'answer' is {answer!r}, but 'answer_index' is {index}")
        return f"{cell_text(columns, 'question')}\n\n{lettered_options(options)}", answer
