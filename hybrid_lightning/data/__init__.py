"""Problems as prompts: sources, formats and the LightningDataModule that joins them."""

from hybrid_lightning.data.source import PromptSource
from hybrid_lightning.data.splitting import Row, Splits, problem_key, split_rows

__all__ = ["PromptSource", "Row", "Splits", "problem_key", "split_rows"]
