"""Sums of the candidates' gradients, of which all is kept, or a sketch.

A `GradientMode` decides how much of each gradient is kept in the sums: all of it (`ExactGradients`) or a sketch
(`SketchedGradients`, in sketch.py). Either is a linear function of the gradient (a `GradientForm`), so gradients of micro-batches
are added up in that form, module by module (`ModuleAccumulator`), as soon as a backward pass has made them.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from hybrid_lightning.adapters.statistics import ExactGradient, Gradient
from hybrid_lightning.configurable import Configurable
from hybrid_lightning.errors import CalibrationError


class GradientForm(ABC):
    """How one module's gradient is kept: a linear map from the gradient to a few tensors, and an estimate from these."""

    @abstractmethod
    def zeros(self) -> tuple[Tensor, ...]:
        """What is kept of a zero gradient, float32, on the device where sums are kept."""

    @abstractmethod
    def compress(self, gradient: Tensor) -> tuple[Tensor, ...]:
        """What is kept of a gradient [m, n]; linear in the gradient."""

    @abstractmethod
    def estimate(self, kept: tuple[Tensor, ...]) -> Gradient:
        """Estimate a gradient from what was kept of it."""


class ExactForm(GradientForm):
    """Keeps the whole gradient, [m, n]."""

    def __init__(self, shape: tuple[int, int], device: torch.device | str) -> None:
        self._shape, self._device = shape, device

    def zeros(self) -> tuple[Tensor, ...]:  # noqa: D102
        return (torch.zeros(self._shape, device=self._device),)

    def compress(self, gradient: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        return (gradient,)

    def estimate(self, kept: tuple[Tensor, ...]) -> Gradient:  # noqa: D102
        return ExactGradient(kept[0])


class GradientMode(Configurable, ABC):
    """How much of each gradient is kept during calibration; a config chooses by class."""

    @abstractmethod
    def form(self, name: str, weight: Tensor, rank: int) -> GradientForm:
        """Choose how the gradient of a weight [m, n] is kept that is scored at this LoRA rank; 0 is one without LoRA."""


class ExactGradients(GradientMode):
    """Keep whole gradients: 4 bytes per candidate parameter; every scorer works with them.

    Args:
        device: Where sums are kept and decomposed; the default leaves the accelerator's memory to the model.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def form(self, name: str, weight: Tensor, rank: int) -> GradientForm:  # noqa: D102
        return ExactForm((weight.shape[0], weight.shape[1]), self.device)


class ModuleAccumulator:
    """Sums of one module's gradients [m, n] over the calibration losses; if `halves`, of even and odd ones, as `noise` needs."""

    def __init__(self, form: GradientForm, shape: tuple[int, int], halves: bool) -> None:
        self._form, self.shape = form, shape
        self._sums = [form.zeros() for _ in range(2 if halves else 1)]
        self.received = torch.zeros(())  # number of gradients added: stays 0 where no calibration loss uses the module
        self.losses = torch.zeros(len(self._sums))  # number of losses in each half (or in all)

    def add(self, gradient: Tensor, index: int) -> None:
        """Add the gradient [m, n] of the loss with this index."""
        for total, part in zip(self._sums[index % len(self._sums)], self._form.compress(gradient), strict=True):
            total.add_(part.to(total.device))
        self.received += 1

    def count_losses(self, number: int) -> None:
        """Set the number of losses in the sums, after the last one: those without a gradient of this module count too."""
        halves = len(self._sums)
        self.losses.copy_(torch.tensor([(number + halves - 1 - half) // halves for half in range(halves)], dtype=torch.float32))

    def tensors(self) -> list[Tensor]:
        """All sums and counts, as they are saved and restored in place."""
        sums = [tensor for half in self._sums for tensor in half]
        return [*sums, self.received, self.losses]

    @property
    def on_cpu(self) -> bool:
        """Whether the sums are in the memory of the host."""
        return all(tensor.device.type == "cpu" for half in self._sums for tensor in half)

    def has_signal(self) -> bool:
        """Whether any kept sum of gradients is not zero."""
        return any(bool(tensor.any()) for half in self._sums for tensor in half)

    def mean(self) -> Gradient:
        """Mean gradient over all losses."""
        return self._combine([1.0 / float(self.losses.sum())] * len(self._sums))

    def noise(self) -> Gradient:
        """Scaled difference of the halves' mean gradients: it has the sampling noise of `mean`, but none of its signal.

        With a even and b odd losses, N = a + b, it is sqrt(b / a) / N * sum_even - sqrt(a / b) / N * sum_odd, which is half the
        difference of the two means if a = b.

        Raises:
            CalibrationError: If there were fewer than two losses.
        """
        even, odd = (float(count) for count in self.losses)
        if min(even, odd) == 0:
            raise CalibrationError(
                "this scorer compares two halves of the calibration losses, but there was only one loss; calibrate "
                "with at least two micro-batches (more rollouts, or a smaller micro-batch)"
            )
        ratio, total = math.sqrt(odd / even), even + odd
        return self._combine([ratio / total, -1.0 / (ratio * total)])

    def _combine(self, factors: list[float]) -> Gradient:
        kept = []
        for parts in zip(*self._sums, strict=True):  # the same tensor of each half
            total = parts[0] * factors[0]
            for part, factor in zip(parts[1:], factors[1:], strict=True):
                total.add_(part, alpha=factor)
            kept.append(total)
        return self._form.estimate(tuple(kept))
