import pytest
import torch

from hybrid_lightning.adapters import PreconditionedTail, Random, TailEnergy, TailFraction
from hybrid_lightning.adapters.gradients import ExactGradient
from hybrid_lightning.adapters.scorers import ModuleStatistics

GRADIENT = torch.diag(torch.tensor([3.0, -2.0, 1.0]))  # singular values 3, 2, 1
WEIGHT = torch.ones(3, 3)


def statistics(gradient=GRADIENT) -> ModuleStatistics:
    return ModuleStatistics("layer", WEIGHT, 9, ExactGradient(gradient))


def test_scores_at_the_ends():
    """All between is in `test_scoring.py`, against full gradients."""
    for rank in (3, 7):
        assert TailEnergy().score(statistics(), rank) == TailFraction().score(statistics(), rank) == pytest.approx(0, abs=1e-12)
    assert PreconditionedTail().score(statistics(torch.zeros(3, 3)), 1) == 0


def test_random_depends_on_seed_and_name_only():
    named = [ModuleStatistics(name, WEIGHT, 9) for name in ("a", "b")]
    scores = [Random(seed).score(module, 1) for seed in (0, 1) for module in named]
    assert len(set(scores)) == 4 and all(0 <= score < 1 for score in scores)
    assert Random(0).score(named[0], 5) == scores[0]
    assert Random(3).to_config() == {"class_path": "hybrid_lightning.adapters.Random", "init_args": {"seed": 3}}
