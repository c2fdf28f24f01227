"""Data sets by name: their place on the hub, and their columns for question and answer.

| class | hub id | training | validation | test |
|---|---|---|---|---|
| `GSM8K` | openai/gsm8k, main | train, 7,473 rows | | test, 1,319 |
| `MATH` | DigitalLearningGmbH/MATH-lighteval | train, 7,500 | | test, 5,000 |
| `MATH500` | HuggingFaceH4/MATH-500 | | | test, 500 |
| `DAPOMath17k` | open-r1/DAPO-Math-17k-Processed | train, about 17,000 | | |
| `AIME24` | HuggingFaceH4/aime_2024 | | | train, 30 |
| `AIME25` | math-ai/aime25 | | | test, 30 |
| `AMC23` | math-ai/amc23 | | | test, 40 |
| `MMLUPro` | TIGER-Lab/MMLU-Pro | | validation, 70 | test, 12,032 |
| `LeetCode` | newfacade/LeetCodeDataset | train, 2,641 | | test, 228 |

The table gives each class's default: the data set's split for each purpose, and its number of rows. You can name other splits,
and use a local copy instead of the hub (see `PresetSource`). All but the last two are mathematics, for `MathMatch`.

- GSM8K (Cobbe et al. 2021, arXiv 2110.14168): grade-school word problems; each answer is a whole number.
- MATH (Hendrycks et al. 2021, arXiv 2103.03874): competition problems with answers in LaTeX. The original,
  hendrycks/competition_math, was taken down; this is the copy that verl trains on.
- MATH-500: the problems of MATH's test split on which Lightman et al. 2023 (arXiv 2305.20050) evaluate. If you test on it, you
  may also train on the other 4,500: a `Mixture` of MATH and MATH-500 drops their common problems from training.
- AIME 2024 and 2025: the 30 problems of each year's two papers; each answer is a whole number from 0 to 999.
- AMC 2023: 40 problems of AMC 12, reworded so that each answer is a number instead of a choice.
- DAPO-Math-17k (arXiv 2503.14476): competition problems, reworded so that each answer is a whole number.
- LeetCodeDataset (Xia et al. 2025, arXiv 2504.14655): Python problems with a class to complete, and tests.
- MMLU-Pro (Wang et al. 2024, arXiv 2406.01574): questions in 14 subjects with up to ten options.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_info

from hybrid_lightning.data.choice_options import lettered_options, option_letter, options_of
from hybrid_lightning.data.conversations import is_conversation
from hybrid_lightning.data.preset_source import PresetSource, boxed_answer, cell_text
from hybrid_lightning.data.splitting import Row, Splits, problem_key
from hybrid_lightning.errors import ConfigError, shorten

# What copies of AIME write around a number: opencompass/AIME2025 has 336^\circ, others have floats or keep LaTeX's delimiters.
_AIME_AROUND = re.compile(r"\A\$|\^\s*\{?\s*\\circ\s*\}?|\u00b0|\.0+(?=\$?\Z)|\$\Z")
# Instructions that the authors of DAPO wrote around each problem; here `data.format` gives them.
_DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer"
)
_DAPO_AFTER = "Remember to put your answer on its own line after"
_DAPO_SUBSETS = ("all", "en", "cn")


class GSM8K(PresetSource):
    """GSM8K, with columns `question` and `answer`, a worked solution with the answer after `####`."""

    hub_path: ClassVar[str] = "openai/gsm8k"
    hub_name = "main"
    splits: ClassVar[dict[str, str]] = {"train": "train", "test": "test"}

    def question_and_answer(self, columns: dict[str, Any]) -> tuple[str, str | None]:
        """Question, and the text after the last `####`."""
        solution = cell_text(columns, "answer")
        answer = solution.rpartition("####")[2].strip() if "####" in solution else ""
        if not answer:
            raise ValueError(f"column 'answer' has no answer after ####: {shorten(solution)}")
        return cell_text(columns, "question"), answer


class MATH(PresetSource):
    r"""MATH, with columns `problem`, `solution` with the answer in its last `\boxed{}`, `level` and `type`."""

    hub_path: ClassVar[str] = "DigitalLearningGmbH/MATH-lighteval"
    splits: ClassVar[dict[str, str]] = {"train": "train", "test": "test"}

    def question_and_answer(self, columns: dict[str, Any]) -> tuple[str, str | None]:
        r"""Problem, and the answer: its own column if there is one, else the last `\boxed{}` of the solution."""
        answer = cell_text(columns, "answer") if "answer" in columns else boxed_answer(columns, "solution")
        return cell_text(columns, "problem", "question"), _words_as_text(answer)


class MATH500(MATH):
    """MATH-500, with columns `problem`, `solution`, `answer`, `subject`, `level` and `unique_id`."""

    hub_path: ClassVar[str] = "HuggingFaceH4/MATH-500"
    splits: ClassVar[dict[str, str]] = {"test": "test"}


class AIMESource(PresetSource):
    """Base of the years of AIME, with whole numbers from 0 to 999 as answers."""

    def question_and_answer(self, columns: dict[str, Any]) -> tuple[str, str | None]:
        """Problem and its answer."""
        spelled = any(name in columns for name in ("answer", "Answer"))
        answer = cell_text(columns, "answer", "Answer") if spelled else boxed_answer(columns, "solution", "Solution")
        number = _AIME_AROUND.sub("", answer)
        if not re.fullmatch(r"\d{1,3}", number):
            raise ValueError(f"the answer {answer!r} is not a whole number from 0 to 999")
        return cell_text(columns, "problem", "Problem", "question"), number


class AIME24(AIMESource):
    r"""AIME 2024, with columns `problem` and `answer`; an answer such as 073 counts as 73 in `MathMatch`.

    Other copies can be read too: with `Problem` and `Answer` (Maxwell-Jia/AIME_2024), or with the answer in the `\boxed{}` of
    `solution` (math-ai/aime24). The hub calls the only split "train".
    """

    hub_path: ClassVar[str] = "HuggingFaceH4/aime_2024"
    splits: ClassVar[dict[str, str]] = {"test": "train"}


class AIME25(AIMESource):
    """AIME 2025, with columns `problem` and `answer`; copies with `question` (opencompass/AIME2025) can be read too."""

    hub_path: ClassVar[str] = "math-ai/aime25"
    splits: ClassVar[dict[str, str]] = {"test": "test"}


class AMC23(PresetSource):
    """AMC 2023, with columns `question` and `answer`; an answer such as 27.0 counts as 27 in `MathMatch`.

    Copies with `problem` (AI-MO/aimo-validation-amc) can be read too, and answers that are a letter from A to E.
    """

    hub_path: ClassVar[str] = "math-ai/amc23"
    splits: ClassVar[dict[str, str]] = {"test": "test"}

    def question_and_answer(self, columns: dict[str, Any]) -> tuple[str, str | None]:
        """Problem and its answer."""
        return cell_text(columns, "question", "problem"), cell_text(columns, "answer")


class DAPOMath17k(PresetSource):
    """DAPO-Math-17k, with columns `prompt` (the problem), `solution` (the answer) and `reward_model`.

    The hub copy that this class reads has each problem once. A local copy of the original, BytedTsinghua-SIA/DAPO-Math-17k, can
    be read too: its problems are extracted from their conversations and instructions, and each is kept once. The original repeats
    every problem about a hundred times, and all of its 1.79 million rows are read into memory.

    Args:
        subset: "all", "en" (English) or "cn" (Chinese).
        **options: Arguments of `PresetSource`.
    """

    hub_path: ClassVar[str] = "open-r1/DAPO-Math-17k-Processed"
    splits: ClassVar[dict[str, str]] = {"train": "train"}

    def __init__(self, subset: str = "all", **options: Any) -> None:
        if subset not in _DAPO_SUBSETS:
            raise ConfigError(f"DAPOMath17k: subset={subset!r}; give one of {', '.join(_DAPO_SUBSETS)}")
        super().__init__(**options)
        self.hub_name = None if subset == "all" else subset  # the hub's default configuration has all problems

    def read(self) -> Splits:
        """Read all splits, and keep each problem of a split once."""
        splits = super().read()
        return Splits(**{name: _distinct_problems(rows) for name, rows in vars(splits).items()})

    def question_and_answer(self, columns: dict[str, Any]) -> tuple[str, str | None]:
        """Problem and its answer."""
        prompt = columns.get("prompt")
        if is_conversation(prompt):
            assert prompt is not None
            columns = {**columns, "prompt": _without_instructions(str(prompt[-1]["content"]))}
        return cell_text(columns, "prompt"), _dapo_answer(columns)


class LeetCode(PresetSource):
    """LeetCodeDataset, for the reward `CodeTests`, which uses its columns by default.

    Columns: `query` (the problem with the code to complete), `prompt` (imports), `entry_point`, `test` (a function `check`) and
    `completion` (a solution). The solution is the reference answer: no reward compares with it, but an adapter plan can be
    scored on it, and supervised training can learn it.
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
    question, one per line as "A. ...". There is no training split. To train on the test split and hold out a part of it, set
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
            raise ValueError(f"column 'answer' is {answer!r}, which is not the letter of one of the {len(options)} options")
        return f"{cell_text(columns, 'question')}\n\n{lettered_options(options)}", answer


def _words_as_text(answer: str) -> str:
    r"""Write an answer in words, such as `even`, as most rows do: `\text{even}`, which `MathMatch` compares as words."""
    words = re.fullmatch(r"[A-Za-z][A-Za-z ,'-]*\.?", answer) and re.search(r"[A-Za-z]{3}", answer)
    return rf"\text{{{answer}}}" if words else answer


def _without_instructions(text: str) -> str:
    paragraphs = text.strip().split("\n\n")
    if len(paragraphs) > 1 and paragraphs[0].startswith(_DAPO_BEFORE):
        paragraphs = paragraphs[1:]
    if len(paragraphs) > 1 and paragraphs[-1].startswith(_DAPO_AFTER):
        paragraphs = paragraphs[:-1]
    return "\n\n".join(paragraphs)


def _dapo_answer(columns: dict[str, Any]) -> str:
    if "reward_model" not in columns:
        return cell_text(columns, "solution", "answer")
    reward_model = columns["reward_model"]
    if isinstance(reward_model, str):
        try:
            reward_model = json.loads(reward_model)
        except json.JSONDecodeError as error:
            raise ValueError(f"column 'reward_model' is not JSON: {error}") from error
    if not isinstance(reward_model, Mapping):
        raise ValueError("column 'reward_model' must be an object with ground_truth")
    return cell_text(dict(reward_model), "ground_truth")


def _distinct_problems(rows: list[Row]) -> list[Row]:
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(problem_key(row.question), row)
    if len(first) < len(rows):
        rank_zero_info(f"DAPOMath17k: {rows[0].source} has {len(first)} distinct problems in {len(rows)} rows; each is kept once")
    return list(first.values())
