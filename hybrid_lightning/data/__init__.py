"""Problems as prompts: sources, formats and the LightningDataModule that joins them."""

from hybrid_lightning.data.arithmetic import ArithmeticSource
from hybrid_lightning.data.columns import GSM8K_ANSWER, TableSource
from hybrid_lightning.data.conversations import ConversationFormat
from hybrid_lightning.data.examples import DemonstrationFormat, PreferenceFormat
from hybrid_lightning.data.files import FileSource
from hybrid_lightning.data.formatting import ChatFormat, PlainFormat, PromptFormat
from hybrid_lightning.data.hub import HubSource
from hybrid_lightning.data.mixture import Mixture
from hybrid_lightning.data.module import PromptDataModule
from hybrid_lightning.data.products import ProductSource
from hybrid_lightning.data.reasoning_gym import ReasoningGymSource
from hybrid_lightning.data.source import PromptSource
from hybrid_lightning.data.splitting import Row, Splits, problem_key, split_rows

__all__ = [
    "GSM8K_ANSWER",
    "ArithmeticSource",
    "ChatFormat",
    "ConversationFormat",
    "DemonstrationFormat",
    "FileSource",
    "HubSource",
    "Mixture",
    "PlainFormat",
    "PreferenceFormat",
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
