"""Data sets by name: where they are on the hub, and which of their columns hold question and answer.

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

The table gives each class's default: the data set's split that is used for each purpose, and its rows. Other splits can be
named, and a local copy used instead of the hub (see `PresetSource`).
"""

from hybrid_lightning.data.presets.data_sets import AIME24, AIME25, AMC23, GSM8K, MATH, MATH500, DAPOMath17k, LeetCode, MMLUPro
from hybrid_lightning.data.presets.preset_source import PresetSource

__all__ = ["AIME24", "AIME25", "AMC23", "GSM8K", "MATH", "MATH500", "DAPOMath17k", "LeetCode", "MMLUPro", "PresetSource"]
