import pytest
import torch

from hybrid_lightning.adapters.gradients import ExactForm, ModuleAccumulator
from hybrid_lightning.errors import CalibrationError


def accumulated(gradients: list[torch.Tensor]) -> ModuleAccumulator:
    shape = (gradients[0].shape[0], gradients[0].shape[1])
    accumulator = ModuleAccumulator(ExactForm(shape, "cpu"), shape, halves=True)
    for index, gradient in enumerate(gradients):
        accumulator.add(gradient, index)
    accumulator.count_losses(len(gradients))
    return accumulator


@pytest.mark.parametrize("count", [2, 3, 6, 7])
def test_noise_has_no_signal_and_the_variance_of_the_mean(count):
    signal = torch.tensor([[3.0, -1.0]])
    assert accumulated([signal] * count).noise().energy() == pytest.approx(0, abs=1e-10)
    # each loss alone weighs as much in the noise as in the mean, summed over the losses
    units = torch.eye(count).unsqueeze(1)
    both = accumulated([units[index] for index in range(count)])
    assert both.noise().energy() == pytest.approx(both.mean().energy(), rel=1e-6)
    assert both.mean().energy() == pytest.approx(1 / count, rel=1e-6)


def test_noise_of_equal_halves_is_half_their_difference_and_sums_are_of_float32():
    a, b = torch.tensor([[1.0, 4.0]]), torch.tensor([[3.0, -2.0]])
    torch.testing.assert_close(accumulated([a, b]).noise().matrix(), (a - b) / 2)
    with pytest.raises(CalibrationError, match="only one loss"):
        accumulated([a]).noise()
    small = torch.full((1, 1), 2**-9, dtype=torch.bfloat16)
    summed = accumulated([torch.ones(1, 1, dtype=torch.bfloat16), *[small] * 511])
    torch.testing.assert_close(summed.mean().matrix(), torch.full((1, 1), (1 + 511 / 512) / 512))
