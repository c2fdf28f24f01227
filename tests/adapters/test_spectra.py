"""Spectra and tail energies against singular value decompositions; scoring on several threads."""

import threading

import pytest
import torch

from hybrid_lightning.adapters import gradients
from hybrid_lightning.adapters.gradients import ExactGradient
from hybrid_lightning.adapters.spectra import krylov_tail_energy, map_on_workers, squared_singular_values

INDEX = torch.arange(1, 121)


def with_spectrum(values: torch.Tensor, shape: tuple[int, int], noise: float = 0.0) -> torch.Tensor:
    """A float32 matrix with these singular values, and noise of full rank."""
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(size, len(values), generator=generator)).Q for size in shape)
    return (left * values) @ right.T + noise * torch.randn(shape, generator=generator)


def tail(matrix: torch.Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(matrix.double())[rank:].square().sum())


@pytest.mark.parametrize(
    ("values", "noise", "shape"),
    [
        (INDEX**-1.0, 1e-3, (300, 420)),  # as gradients of language models decay
        (INDEX**-0.5, 1e-2, (420, 300)),
        (0.85**INDEX, 0.0, (300, 420)),  # almost all energy within the rank
        (torch.where(INDEX <= 40, 1 - 1e-3 * INDEX, 0.1), 1e-3, (420, 300)),  # the cut at the rank goes through a cluster
    ],
)
def test_krylov_tail_energy_against_a_singular_value_decomposition(values, noise, shape):
    matrix = with_spectrum(values.float(), shape, noise)
    for rank in (1, 4, 8):
        torch.manual_seed(rank)
        assert krylov_tail_energy(matrix, rank) == pytest.approx(tail(matrix, rank), rel=1e-7), rank
    assert torch.initial_seed() == 8
    torch.manual_seed(1)
    assert krylov_tail_energy(matrix, 4) == krylov_tail_energy(matrix, 4), "the same number whatever has been drawn"


FLAT = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))  # noise: no gap anywhere


def test_it_gives_no_number_that_it_cannot_vouch_for():
    for matrix in (with_spectrum(torch.ones(60), (300, 320)), torch.zeros(300, 300)):
        answer = krylov_tail_energy(matrix, 8)
        assert answer is None or answer == pytest.approx(tail(matrix, 8), rel=1e-7)
    assert krylov_tail_energy(FLAT, 8) is krylov_tail_energy(FLAT, 40) is None, "no number either without room for a space"


def test_large_gradients_take_it_and_fall_back_to_all_eigenvalues(monkeypatch):
    monkeypatch.setattr(gradients, "KRYLOV_FROM", 256)
    decaying = with_spectrum(INDEX**-1.0, (300, 420), 1e-3)
    spectra = []
    monkeypatch.setattr(gradients, "squared_singular_values", lambda m: spectra.append(1) or squared_singular_values(m))
    assert ExactGradient(decaying).tail_energy(8) == pytest.approx(tail(decaying, 8), rel=1e-7)
    assert not spectra
    for matrix, rank in ((FLAT, 8), (FLAT[:120], 5), (FLAT[:, :9], 6)):
        assert ExactGradient(matrix).tail_energy(rank) == pytest.approx(tail(matrix, rank), rel=1e-9)
    assert len(spectra) == 3
    assert ExactGradient(torch.diag(torch.tensor([1.0, 1e-6]))).tail_energy(1) == pytest.approx(1e-12, rel=1e-3), "no cancelling"
    assert ExactGradient(decaying).tail_energy(300) == 0


def test_items_keep_their_order_and_run_at_the_same_time_and_decompositions_take_one_thread(monkeypatch):
    both, seen, eigvalsh = threading.Barrier(2, timeout=20), [], torch.linalg.eigvalsh

    def wait(item: int) -> int:
        both.wait()  # passes only if two of them are running
        return 10 * item + torch.get_num_threads()

    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda gram: seen.append(torch.get_num_threads()) or eigvalsh(gram))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert map_on_workers(wait, [3, 1, 2, 4]) == [31, 11, 21, 41] and map_on_workers(wait, []) == []
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        squared_singular_values(torch.eye(3))
        assert [*seen, torch.get_num_threads()] == [2, 1, 2], "in later threads, for a small matrix, and afterwards"
    finally:
        torch.set_num_threads(before)
