"""Problems as prompts: sources, formats and the LightningDataModule that joins them."""

from hybrid_lightning.data.arithmetic import ArithmeticSource
from hybrid_lightning.data.columns import GSM8K_ANSWER, TableSource
from hybrid_lightning.data.conversations import ConversationFormat
from hybrid_lightning.data.examples import DemonstrationFormat, PreferenceFormat
from hybrid_lightning.data.files import FileSource
from hybrid_lightning.data.format_by_set import FormatBySet
from hybrid_lightning.data.formatting import ChatFormat, PlainFormat, PromptFormat
from hybrid_lightning.data.hub import HubSource
from hybrid_lightning.data.mixture import Mixture
from hybrid_lightning.data.module import PromptDataModule
from hybrid_lightning.data.presets import (
    AIME24,
    AIME25,
    AMC23,
    GSM8K,
    MATH,
    MATH500,
    DAPOMath17k,
    LeetCode,
    MMLUPro,
    PresetSource,
)
from hybrid_lightning.data.products import ProductSource
from hybrid_lightning.data.reasoning_gym import ReasoningGymSource
from hybrid_lightning.data.source import PromptSource
from hybrid_lightning.data.splitting import Row, Splits, problem_key, split_rows

__all__ = [
    "AIME24",
    "AIME25",
    "AMC23",
    "GSM8K",
    "GSM8K_ANSWER",
    "MATH",
    "MATH500",
    "ArithmeticSource",
    "ChatFormat",
    "ConversationFormat",
    "DAPOMath17k",
    "DemonstrationFormat",
    "FileSource",
    "FormatBySet",
    "HubSource",
    "LeetCode",
    "MMLUPro",
    "Mixture",
    "PlainFormat",
    "PreferenceFormat",
    "PresetSource",
    "ProductSource",
    "PromptDataModule",
    "PromptFormat",
    "PromptSource",
    "ReasoningGymSource",
    "Row",
    "Splits",
    "TableSource",
    "problem_key",
    "split_rows",
]
