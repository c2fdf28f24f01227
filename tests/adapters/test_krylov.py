import pytest
import torch

from hybrid_lightning.adapters import statistics
from hybrid_lightning.adapters.spectra import krylov_tail_energy
from hybrid_lightning.adapters.statistics import ExactGradient


def with_spectrum(values: torch.Tensor, shape: tuple[int, int], noise: float = 0.0) -> torch.Tensor:
    """A float32 matrix with these singular values, and noise of full rank."""
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(size, len(values), generator=generator)).Q for size in shape)
    return (left * values) @ right.T + noise * torch.randn(shape, generator=generator)


def tail(matrix: torch.Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(matrix.double())[rank:].square().sum())


INDEX = torch.arange(1, 121)


@pytest.mark.parametrize(
    ("values", "noise"),
    [
        (INDEX**-1.0, 1e-3),  # as gradients of language models decay
        (INDEX**-0.5, 1e-2),
        (0.85**INDEX, 0.0),  # almost all energy within the rank
        (torch.where(INDEX <= 40, 1 - 1e-3 * INDEX, 0.1), 1e-3),  # the cut at the rank goes through a cluster
    ],
)
@pytest.mark.parametrize("shape", [(300, 420), (420, 300)])
def test_tail_energy_against_a_singular_value_decomposition(values, noise, shape):
    matrix = with_spectrum(values.float(), shape, noise)
    for rank in (1, 4, 8):
        assert krylov_tail_energy(matrix, rank) == pytest.approx(tail(matrix, rank), rel=1e-7), rank


def test_it_gives_no_number_that_it_cannot_vouch_for():
    flat = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))  # noise: no gap anywhere
    tied = with_spectrum(torch.ones(60), (300, 320), 0.0)
    for matrix in (flat, tied, torch.zeros(300, 300)):
        answer = krylov_tail_energy(matrix, 8)
        assert answer is None or answer == pytest.approx(tail(matrix, 8), rel=1e-7)
    assert krylov_tail_energy(flat, 8) is None
    assert krylov_tail_energy(flat, 40) is None  # no room for a space


def test_large_gradients_take_it_and_fall_back_to_all_eigenvalues(monkeypatch):
    monkeypatch.setattr(statistics, "KRYLOV_FROM", 256)
    decaying = with_spectrum(INDEX**-1.0, (300, 420), 1e-3)
    flat = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    spectra = []
    original = statistics.squared_singular_values
    monkeypatch.setattr(statistics, "squared_singular_values", lambda matrix: spectra.append(1) or original(matrix))
    assert ExactGradient(decaying).tail_energy(8) == pytest.approx(tail(decaying, 8), rel=1e-7)
    assert not spectra
    assert ExactGradient(flat).tail_energy(8) == pytest.approx(tail(flat, 8), rel=1e-9)
    assert len(spectra) == 1
    assert ExactGradient(decaying).tail_energy(300) == 0


def test_the_same_matrix_gives_the_same_number():
    matrix = with_spectrum(INDEX**-1.0, (300, 420), 1e-3)
    torch.manual_seed(1)
    first = krylov_tail_energy(matrix, 8)
    torch.manual_seed(2)
    assert first == krylov_tail_energy(matrix, 8) and torch.initial_seed() == 2
