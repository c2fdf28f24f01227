import pytest
import torch

from hybrid_lightning.adapters.gradients import ExactGradient, GradientSum
from hybrid_lightning.adapters.sketch import SketchedGradients, SketchedSum
from hybrid_lightning.errors import ConfigError

ROWS, COLUMNS = 90, 120


def decaying_matrix(power: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(ROWS, ROWS, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(COLUMNS, ROWS, generator=generator)).Q
    return left * torch.arange(1, ROWS + 1) ** -power @ right.T


def sketch(matrix: torch.Tensor, size: int, seed: int = 0):
    total = SketchedSum("layer", (ROWS, COLUMNS), matrix.device, size, seed)
    total.add(matrix)
    return total.mean(1)


def test_energy_has_no_bias():
    matrix = decaying_matrix(0.5)
    energies = torch.tensor([sketch(matrix, size=10, seed=seed).energy() for seed in range(200)])
    standard_error = float(energies.std()) / 200**0.5
    assert float(energies.mean()) == pytest.approx(ExactGradient(matrix).energy(), abs=4 * standard_error)
    assert standard_error < 0.02 * ExactGradient(matrix).energy()


@pytest.mark.parametrize("power", [0.7, 1.0, 1.5])
def test_tail_energy_is_close_at_the_default_size(power):
    matrix = decaying_matrix(power)
    assert sketch(matrix, size=2 * 8 + 10).tail_energy(8) == pytest.approx(ExactGradient(matrix).tail_energy(8), rel=0.15)


def test_adams_step_is_told_from_sketches_of_the_gradient():
    """Gradients of few and of many directions, with rows and columns of different size: the tails compare alike."""
    exact, sketched = [], []
    for number in range(16):
        generator = torch.Generator().manual_seed(number)
        directions = (8, 16, 32, 90)[number % 4]
        matrix = torch.randn(ROWS, directions, generator=generator) @ torch.randn(directions, COLUMNS, generator=generator)
        scale = 0.1 * (number // 4 + 1)
        rows, columns = (torch.randn(size, generator=generator).mul(scale).exp() for size in (ROWS, COLUMNS))
        matrix = rows[:, None] * matrix * columns
        exact.append(ExactGradient(matrix).preconditioned().tail_energy(4))
        sketched.append(sketch(matrix, size=30, seed=number).preconditioned().tail_energy(4))
    assert sketched == pytest.approx(exact, rel=0.15)


def test_what_is_kept_of_a_gradient_and_what_cannot_be():
    weight, mode, matrix = torch.empty(ROWS, COLUMNS), SketchedGradients(seed=1), decaying_matrix(1.0)
    total = mode.new_sum("a", weight, 4)
    first, again, other = (made.compress(matrix) for made in (total, mode.new_sum("a", weight, 4), mode.new_sum("b", weight, 4)))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]) and not torch.equal(first[0], other[0])
    assert first[0].shape == (ROWS, 18) and first[1].shape == (37, COLUMNS)
    parts = [decaying_matrix(1.0, 1), decaying_matrix(0.3, 2)]
    for whole, a, b in zip(total.compress(sum(parts)), *map(total.compress, parts), strict=True):  # linear in the gradient
        torch.testing.assert_close(whole, a + b, rtol=1e-4, atol=1e-4)
    kept = sum(tensor.numel() for tensor in SketchedGradients().new_sum("a", torch.empty(2048, 2048), 16).sums)
    assert kept < 0.07 * 2048**2
    assert type(SketchedGradients().new_sum("a", torch.empty(32, 32), 8)) is GradientSum
    estimate = sketch(torch.zeros(ROWS, COLUMNS), 6)
    assert estimate.energy() == estimate.tail_energy(2) == 0
    for make, message in (
        (lambda: SketchedGradients(size=0), "size=0"),
        (lambda: SketchedGradients(size=8).new_sum("a", weight, 8), "not above the LoRA rank 8"),
        (estimate.matrix, "needs whole gradients"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()
