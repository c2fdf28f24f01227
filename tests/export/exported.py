"""What the export tests share beside their fixtures."""

from pathlib import Path

import torch
from torch import Tensor, nn

from hybrid_lightning.adapters import LoraSettings

TOKENS = torch.randint(3, 40, (3, 10), generator=torch.Generator().manual_seed(7))
VARIANTS = {
    "lora": LoraSettings(rank=4, alpha=6),
    "dora": LoraSettings(rank=4, alpha=6, use_dora=True),
    "rslora": LoraSettings(rank=4, alpha=6, dropout=0.1, use_rslora=True),
}
MIXED = {"attention": 1, "mlp": 5}
# Families (plain; with biases; with tied embeddings; with transposed weights), variants of LoRA, shares trained fully, ranks.
CASES = [
    ("llama", "lora", 0, {}),
    ("llama", "dora", 0.3, MIXED),
    ("llama", "rslora", 1, {}),
    ("gpt2", "dora", 0.3, {}),
    ("gpt2", "lora", 1, {}),
    ("qwen2", "lora", 0.3, MIXED),
    ("gemma", "rslora", 0.3, MIXED),
]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
