"""DAPO-Math-17k (arXiv 2503.14476): competition problems, reworded so that each answer is a whole number."""

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_info

from hybrid_lightning.data.conversations import is_conversation
from hybrid_lightning.data.presets.base import PresetSource
from hybrid_lightning.data.presets.cells import cell
from hybrid_lightning.data.splitting import Row, Splits, problem_key
from hybrid_lightning.errors import ConfigError

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
