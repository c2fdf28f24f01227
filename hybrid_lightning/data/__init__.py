"""Problems and prompts: sources read problems, formats turn them into prompts, and a LightningDataModule serves them."""

from hybrid_lightning.data.arithmetic import ArithmeticSource, ProductSource
from hybrid_lightning.data.columns import GSM8K_ANSWER, TableSource
from hybrid_lightning.data.conversations import ConversationFormat
from hybrid_lightning.data.data_module import PromptDataModule
from hybrid_lightning.data.example_formats import DemonstrationFormat, PreferenceFormat
from hybrid_lightning.data.formatting import ChatFormat, FormatBySet, PlainFormat, PromptFormat
from hybrid_lightning.data.preset_source import PresetSource
from hybrid_lightning.data.presets import AIME24, AIME25, AMC23, GSM8K, MATH, MATH500, DAPOMath17k, LeetCode, MMLUPro
from hybrid_lightning.data.reasoning_gym_source import ReasoningGymSource
from hybrid_lightning.data.source import EpisodeSource, Mixture, PromptSource
from hybrid_lightning.data.splitting import Row, Splits, problem_key, split_rows
from hybrid_lightning.data.table_sources import FileSource, HubSource, RowsSource

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
    "EpisodeSource",
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
    "RowsSource",
    "Splits",
    "TableSource",
    "problem_key",
    "split_rows",
]
