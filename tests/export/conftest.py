"""Policies as after training, on tiny bases of several families."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from exported import logits
from tiny_models import build_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hybrid_lightning.adapters import LoraSettings, ModuleBudget, Random, apply_plan, find_candidates, make_plan
from hybrid_lightning.adapters.apply import trainable_state
from hybrid_lightning.adapters.budgets import ModuleScores
from hybrid_lightning.adapters.candidates import ranks_by_pattern
from hybrid_lightning.adapters.plan import PlannedModel, model_digest
from hybrid_lightning.export import TrainedPolicy
from hybrid_lightning.export.trained import Training, peft_weights
from hybrid_lightning.model.loading import DTYPES
from hybrid_lightning.model.pretrained import Pretrained


@dataclass(frozen=True)
class Trained:
    """A policy in memory, and what is exported of it."""

    model: nn.Module
    policy: TrainedPolicy

    @property
    def logits(self) -> Tensor:
        return logits(self.model)


@pytest.fixture
def train(make_model, tmp_path) -> Callable[..., Trained]:
    """Write a base, adapt it, and move every trained weight as far as some training would."""

    def build(
        family: str = "llama",
        share: float = 0.2,
        lora: LoraSettings | None = None,
        dtype: str = "float32",
        keep_start_weights: bool = True,
        training: Training | None = None,
        ranks: dict[str, int] | None = None,
        **base: str,
    ) -> Trained:
        lora = lora or LoraSettings(rank=4, alpha=6)
        folder = tmp_path / f"base-{family}"
        make_model(family).to(DTYPES[dtype]).save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
        candidates = find_candidates(model)
        plan = make_plan(
            PlannedModel(str(folder), model_digest(model)),
            candidates,
            ModuleBudget(share),
            lora,
            ModuleScores({name: hash_score(name) for name in candidates}, Random(0)),
            ranks=ranks_by_pattern(candidates, ranks or {}, lora.rank),
        )
        adapted = apply_plan(model, plan, keep_start_weights)
        generator = torch.Generator().manual_seed(1)
        for weight in trainable_state(adapted).values():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
        weights = peft_weights(trainable_state(adapted), plan, "the test")
        start = Pretrained(str(folder), dtype=dtype, **base)
        return Trained(adapted.eval(), TrainedPolicy(plan, weights, start, training or Training(steps=3)))

    return build


def hash_score(name: str) -> float:
    """The same in every process."""
    return float(sum((place + 1) * ord(letter) for place, letter in enumerate(name)) % 97)
