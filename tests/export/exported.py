"""What the export tests share beside their fixtures."""

from pathlib import Path

import torch
from torch import Tensor, nn

from hybrid_lightning.adapters.lora import LoraSettings

TOKENS = torch.randint(3, 40, (3, 10), generator=torch.Generator().manual_seed(7))
FAMILIES = ["llama", "qwen2", "gemma", "gpt2"]  # plain, with biases, with tied embeddings, with transposed weights
VARIANTS = {
    "lora": LoraSettings(rank=4, alpha=6),
    "dora": LoraSettings(rank=4, alpha=6, use_dora=True),
    "rslora": LoraSettings(rank=4, alpha=6, dropout=0.1, use_rslora=True),
}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
