"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): grade-school word problems, whose answers are whole numbers.

MATH (Hendrycks et al. 2021, arXiv 2103.03874): problems of mathematics competitions with LaTeX answers.

The original, hendrycks/competition_math, was taken down; the copy is the one that verl trains on. MATH-500 are those of the test
split on which Lightman et al. 2023 (arXiv 2305.20050) evaluate: whoever tests on it may train on the other 4,500 too, and a
`Mixture` of the two drops what they have in common.

AIME 2024 and 2025: the 30 problems of each year's two papers, whose answers are whole numbers from 0 to 999.

AMC 2023: 40 problems of AMC 12, reworded so that each answer is a number and no choice.

DAPO-Math-17k (arXiv 2503.14476): competition problems, reworded so that each answer is a whole number.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_info

from hybrid_lightning.data.conversations import is_conversation
from hybrid_lightning.data.presets.preset_source import PresetSource, boxed_cell, cell
from hybrid_lightning.data.splitting import Row, Splits, problem_key
from hybrid_lightning.data.values import shorten
from hybrid_lightning.errors import ConfigError


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


# What the authors wrote around each problem, and `data.format` says instead.
_BEFORE = "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer"
_AFTER = "Remember to put your answer on its own line after"
_SUBSETS = ("all", "en", "cn")


class DAPOMath17k(PresetSource):
    """Columns `prompt` (the problem), `solution` (the answer) and `reward_model`; for `MathMatch`.

    On the hub it is the copy without the original's repetitions. The original, BytedTsinghua-SIA/DAPO-Math-17k, is read too as a
    local copy: its problems are taken out of their conversation and instructions, and each is kept once. It has every problem
    about a hundred times, and all 1.79 million rows are read into memory.

    Args:
        train_split: As in `PresetSource`.
        validation_split: As in `PresetSource`.
        test_split: As in `PresetSource`.
        subset: "all", "en" (English) or "cn" (Chinese).
        **options: Further arguments of `PresetSource`.
    """

    hub_path: ClassVar[str] = "open-r1/DAPO-Math-17k-Processed"

    def __init__(
        self,
        train_split: str | None = "train",
        validation_split: str | None = None,
        test_split: str | None = None,
        subset: str = "all",
        **options: Any,
    ) -> None:
        if subset not in _SUBSETS:
            raise ConfigError(f"DAPOMath17k: subset={subset!r}: give one of {', '.join(_SUBSETS)}")
        super().__init__(train_split=train_split, validation_split=validation_split, test_split=test_split, **options)
        self.hub_name = None if subset == "all" else subset  # what the hub gives without a name is all

    def read(self) -> Splits:
        """Read all splits, each problem once."""
        splits = super().read()
        return Splits(**{name: _distinct(rows) for name, rows in vars(splits).items()})

    def question_and_answer(self, columns: dict[str, Any]) -> tuple[str, str | None]:
        """The problem and its answer."""
        prompt = columns.get("prompt")
        if is_conversation(prompt):
            assert prompt is not None
            columns = {**columns, "prompt": _without_instructions(str(prompt[-1]["content"]))}
        return cell(columns, "prompt"), _ground_truth(columns)


def _without_instructions(text: str) -> str:
    paragraphs = text.strip().split("\n\n")
    if len(paragraphs) > 1 and paragraphs[0].startswith(_BEFORE):
        paragraphs = paragraphs[1:]
    if len(paragraphs) > 1 and paragraphs[-1].startswith(_AFTER):
        paragraphs = paragraphs[:-1]
    return "\n\n".join(paragraphs)


def _ground_truth(columns: dict[str, Any]) -> str:
    if "reward_model" not in columns:
        return cell(columns, "solution", "answer")
    reward_model = columns["reward_model"]
    if isinstance(reward_model, str):
        try:
            reward_model = json.loads(reward_model)
        except json.JSONDecodeError as error:
            raise ValueError(f"column 'reward_model' is no JSON: {error}") from error
    if not isinstance(reward_model, Mapping):
        raise ValueError("column 'reward_model' must be an object with ground_truth")
    return cell(dict(reward_model), "ground_truth")


def _distinct(rows: list[Row]) -> list[Row]:
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(problem_key(row.question), row)
    if len(first) < len(rows):
        rank_zero_info(f"DAPOMath17k: {rows[0].source} has {len(first)} different problems in {len(rows)} rows: kept once")
    return list(first.values())
