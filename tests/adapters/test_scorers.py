import math

import pytest
import torch

from hybrid_lightning.adapters.scorers import (
    GradientNorm,
    PreconditionedTail,
    Probe,
    Random,
    Scorer,
    SpectrumSNR,
    TailEnergy,
    TailFraction,
    WeightGradient,
)
from hybrid_lightning.adapters.spectra import best_low_rank
from hybrid_lightning.adapters.statistics import ExactGradient, ModuleStatistics
from hybrid_lightning.errors import ConfigError

GRADIENT = torch.diag(torch.tensor([3.0, -2.0, 1.0]))  # singular values 3, 2, 1
WEIGHT = torch.tensor([[1.0, 5.0, 5.0], [5.0, 2.0, 5.0], [5.0, 5.0, -4.0]])


def statistics(gradient=GRADIENT, **more) -> ModuleStatistics:
    return ModuleStatistics("layer", WEIGHT.clone(), 9, gradient=ExactGradient(gradient), **more)


@pytest.mark.parametrize(("rank", "tail"), [(1, 5.0), (2, 1.0), (3, 0.0), (7, 0.0)])
def test_tail_scores_by_hand(rank, tail):
    assert TailEnergy().score(statistics(), rank) == pytest.approx(tail, abs=1e-12)
    assert TailFraction().score(statistics(), rank) == pytest.approx(tail / 14, abs=1e-12)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_tail_energy_against_a_singular_value_decomposition(shape):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    squares = torch.linalg.svdvals(gradient.double()).square()
    for rank in (1, 3, 5, 6):
        assert ExactGradient(gradient).tail_energy(rank) == pytest.approx(float(squares[rank:].sum()), rel=1e-9)
    torch.testing.assert_close(ExactGradient(gradient).spectrum(), squares)


def test_tail_energy_does_not_cancel():
    gradient = torch.diag(torch.tensor([1.0, 1e-6]))
    assert TailEnergy().score(statistics(gradient), 1) == pytest.approx(1e-12, rel=1e-3)


def test_magnitude_scores_by_hand():
    assert GradientNorm().score(statistics(), 1) == pytest.approx(math.sqrt(14))
    assert WeightGradient().score(statistics(), 1) == pytest.approx(3 * 1 + 2 * 2 + 1 * 4)


def test_preconditioned_tail_by_hand():
    # The squares of G have rows with the means 3, 4/3 and 1/3, as the columns have; all have 14/9. So the diagonal becomes
    # its value over these, (1, 3/2, 3), times the root of 14/9.
    assert PreconditionedTail().score(statistics(), 1) == pytest.approx((1 + 9 / 4) * 14 / 9)
    assert PreconditionedTail().score(statistics(torch.zeros(3, 3)), 1) == 0


def test_preconditioned_tail_does_not_depend_on_the_scale_of_rows_and_columns():
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(6, 9, generator=generator)
    scaled = torch.rand(6, 1, generator=generator).add(0.1) * gradient

    def score(matrix):
        return PreconditionedTail().score(statistics(matrix), 2)

    assert score(1e-3 * gradient) == pytest.approx(score(gradient)) and score(gradient.T) == pytest.approx(score(gradient))
    assert score(scaled) == pytest.approx(score(gradient), rel=0.1)


def test_snr_compares_the_tails_of_signal_and_noise():
    def score(noise: float) -> float:
        return SpectrumSNR().score(statistics(noise=ExactGradient(noise * GRADIENT)), 1)

    assert score(0.0) == 1
    assert score(0.5) == pytest.approx((4 - 1) / (4 + 1))  # noise of half the size has a quarter of the energy
    assert score(1.0) == 0 and score(2.0) == 0
    zero = torch.zeros(3, 3)
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


def test_probe_restores_the_weight_after_an_error():
    def evaluate_loss() -> float:
        raise KeyError("out of rollouts")

    given = statistics(evaluate_loss=evaluate_loss)
    with pytest.raises(KeyError):
        Probe().score(given, 1)
    assert torch.equal(given.weight, WEIGHT)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_low_rank_is_the_truncated_decomposition(shape):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(best_low_rank(matrix, 2), u[:, :2] * s[:2] @ v[:2])


def test_random_depends_on_seed_and_name_only():
    named = [ModuleStatistics(name, WEIGHT, 9) for name in ("a", "b")]
    scores = [Random(seed).score(module, 1) for seed in (0, 1) for module in named]
    assert len(set(scores)) == 4 and all(0 <= score < 1 for score in scores)
    assert Random(0).score(named[0], 5) == scores[0]


@pytest.mark.parametrize(
    "scorer", [TailEnergy, TailFraction, PreconditionedTail, GradientNorm, WeightGradient, SpectrumSNR, Probe]
)
def test_what_was_not_collected_is_named(scorer):
    with pytest.raises(ConfigError, match=f"{scorer.__name__} needs"):
        scorer().score(ModuleStatistics("layer", WEIGHT, 9), 1)


def test_wrong_arguments():
    with pytest.raises(ConfigError, match="step=-1"):
        Probe(step=-1)


def test_scorers_remember_their_arguments():
    assert Random(3).to_config() == {
        "class_path": "hybrid_lightning.adapters.Random",
        "init_args": {"seed": 3},
    }
    assert issubclass(Random, Scorer)


def test_decompositions_leave_the_number_of_threads(monkeypatch):
    seen = []
    eigvalsh = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda gram: seen.append(torch.get_num_threads()) or eigvalsh(gram))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        TailEnergy().score(statistics(), 1)
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
