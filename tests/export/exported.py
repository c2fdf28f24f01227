"""What the export tests share beside their fixtures."""

from pathlib import Path

import torch
from torch import Tensor, nn

from hybrid_lightning.adapters.lora_settings import LoraSettings

TOKENS = torch.randint(3, 40, (3, 10), generator=torch.Generator().manual_seed(7))
FAMILIES = ["llama", "qwen2", "gemma", "gpt2"]  # plain, with biases, with tied embeddings, with transposed weights
VARIANTS = {
    "lora": LoraSettings(rank=4, alpha=6),
    "dora": LoraSettings(rank=4, alpha=6, use_dora=True),
    "rslora": LoraSettings(rank=4, alpha=6, dropout=0.1, use_rslora=True),
}
# Every family at every budget, and every variant in both layouts of weights.
CASES = [(family, "lora", share) for family in FAMILIES for share in (0, 0.3, 1)]
CASES += [(family, variant, 0.3) for family in ("llama", "gpt2") for variant in ("dora", "rslora")]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
