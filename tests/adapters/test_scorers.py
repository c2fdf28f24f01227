import math

import pytest
import torch

from hybrid_lightning.adapters import GradientNorm, PreconditionedTail, Probe, Random, SpectrumSNR, TailEnergy, TailFraction
from hybrid_lightning.adapters.scorers import WeightGradient
from hybrid_lightning.adapters.statistics import ExactGradient, ModuleStatistics
from hybrid_lightning.errors import ConfigError

GRADIENT = torch.diag(torch.tensor([3.0, -2.0, 1.0]))  # singular values 3, 2, 1
WEIGHT = torch.tensor([[1.0, 5.0, 5.0], [5.0, 2.0, 5.0], [5.0, 5.0, -4.0]])


def statistics(gradient=GRADIENT, **more) -> ModuleStatistics:
    return ModuleStatistics("layer", WEIGHT.clone(), 9, gradient=ExactGradient(gradient), **more)


def test_scores_at_the_ends():
    """All between is in `test_scoring.py`, against full gradients."""
    zero = torch.zeros(3, 3)
    for rank in (3, 7):
        assert TailEnergy().score(statistics(), rank) == TailFraction().score(statistics(), rank) == pytest.approx(0, abs=1e-12)
    assert PreconditionedTail().score(statistics(zero), 1) == 0
    for noise, expected in ((0.0, 1), (0.5, (4 - 1) / (4 + 1)), (1.0, 0), (2.0, 0)):  # of half the size: a quarter of the energy
        assert SpectrumSNR().score(statistics(noise=ExactGradient(noise * GRADIENT)), 1) == pytest.approx(expected)
    assert SpectrumSNR().score(statistics(zero, noise=ExactGradient(zero)), 1) == 0


def test_probe_measures_both_steps_and_restores_the_weight():
    """On the loss <G, W>, whose gradient is G, the gain is exactly t T_r(G)."""
    seen = []

    def evaluate_loss() -> float:
        seen.append(given.weight.clone())
        return float((GRADIENT * given.weight).sum())

    given = statistics(evaluate_loss=evaluate_loss)
    step = 0.02
    length = step * float(WEIGHT.norm()) / math.sqrt(14)
    assert Probe(step).score(given, 1) == pytest.approx(length * 5.0, rel=1e-4)
    assert torch.equal(given.weight, WEIGHT) and len(seen) == 2
    torch.testing.assert_close(seen[0], WEIGHT - length * torch.diag(torch.tensor([3.0, 0, 0])))
    torch.testing.assert_close(seen[1], WEIGHT - length * GRADIENT)
    assert Probe().score(given, 3) == 0 and len(seen) == 2
    failing = statistics(evaluate_loss=lambda: {}["out of rollouts"])
    with pytest.raises(KeyError):
        Probe().score(failing, 1)
    assert torch.equal(failing.weight, WEIGHT)
    with pytest.raises(ConfigError, match="step=-1"):
        Probe(step=-1)


def test_random_depends_on_seed_and_name_only():
    named = [ModuleStatistics(name, WEIGHT, 9) for name in ("a", "b")]
    scores = [Random(seed).score(module, 1) for seed in (0, 1) for module in named]
    assert len(set(scores)) == 4 and all(0 <= score < 1 for score in scores)
    assert Random(0).score(named[0], 5) == scores[0]
    assert Random(3).to_config() == {"class_path": "hybrid_lightning.adapters.Random", "init_args": {"seed": 3}}


@pytest.mark.parametrize("kind", [TailEnergy, TailFraction, PreconditionedTail, GradientNorm, WeightGradient, SpectrumSNR, Probe])
def test_what_was_not_collected_is_named(kind):
    with pytest.raises(ConfigError, match=f"{kind.__name__} needs"):
        kind().score(ModuleStatistics("layer", WEIGHT, 9), 1)
