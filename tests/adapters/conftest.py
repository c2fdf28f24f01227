"""A tiny policy, calibration losses and a plan, shared by the adapter tests."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from hybrid_lightning.adapters import AdapterPlan, LoraSettings, ModuleBudget, Random, find_candidates, make_plan
from hybrid_lightning.adapters.budgets import ModuleScores
from hybrid_lightning.adapters.candidates import ranks_by_pattern
from hybrid_lightning.adapters.plan import PlannedModel, model_digest

MICRO_BATCHES = torch.randint(3, 40, (6, 3, 10), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def batches() -> Tensor:
    """[6 micro-batches, 3 rows, 10 tokens]."""
    return MICRO_BATCHES


@pytest.fixture
def losses() -> Callable[[nn.Module], Iterator[Tensor]]:
    """Next-token losses of each micro-batch, computed one after another."""

    def compute(model: nn.Module) -> Iterator[Tensor]:
        for tokens in MICRO_BATCHES:
            yield model(tokens, labels=tokens).loss

    return compute


@pytest.fixture
def plan_for() -> Callable[..., AdapterPlan]:
    """A plan with random scores, and ranks by a pattern."""

    def build(model, budget=None, lora=None, seed=0, ranks=None) -> AdapterPlan:
        candidates, lora = find_candidates(model), lora or LoraSettings(rank=4, alpha=8)
        order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed)).tolist()
        scores = {name: 1.0 + place for name, place in zip(candidates, order, strict=True)}
        own, planned = ranks_by_pattern(candidates, ranks or {}, lora.rank), PlannedModel("tiny", model_digest(model))
        return make_plan(planned, candidates, budget or ModuleBudget(0.2), lora, ModuleScores(scores, Random(seed)), own)

    return build
