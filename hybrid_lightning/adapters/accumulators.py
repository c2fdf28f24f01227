"""Where a module's gradients go, one micro-batch after another: linear forms of G, so that sums over micro-batches
(and ranks) are sums of forms.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from hybrid_lightning.adapters.statistics import ExactGradient, Gradient
from hybrid_lightning.errors import CalibrationError
from hybrid_lightning.parts import Part


class GradientForm(ABC):
    """A linear map of one module's gradient to the tensors that are kept of it, and the way back."""

    @abstractmethod
    def zeros(self) -> tuple[Tensor, ...]:
        """The form of a zero gradient, float32, on the device where it is to be kept."""

    @abstractmethod
    def compress(self, gradient: Tensor) -> tuple[Tensor, ...]:
        """Map a gradient [m, n]; linear in it."""

    @abstractmethod
    def estimate(self, kept: tuple[Tensor, ...]) -> Gradient:
        """What is known of the gradient whose form is `kept`."""


class ExactForm(GradientForm):
    """Keeps the gradient as it is.

    Args:
        shape: (m, n).
        device: where to keep it.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device | str) -> None:
        self._shape, self._device = shape, device

    def zeros(self) -> tuple[Tensor, ...]:  # noqa: D102
        return (torch.zeros(self._shape, device=self._device),)

    def compress(self, gradient: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        return (gradient,)

    def estimate(self, kept: tuple[Tensor, ...]) -> Gradient:  # noqa: D102
        return ExactGradient(kept[0])


class GradientMode(Part, ABC):
    """How much of each gradient is kept during calibration; choose by class."""

    @abstractmethod
    def form(self, name: str, weight: Tensor, rank: int) -> GradientForm:
        """Choose the form for one module.

        Args:
            name: full dotted name of the module.
            weight: its weight, [m, n].
            rank: LoRA rank at which it will be scored.
        """


class ExactGradients(GradientMode):
    """Keep every entry: 4 bytes per candidate parameter, and any scorer works.

    Args:
        device: where the sums are kept and decomposed; the default leaves the accelerator's memory to the model.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def form(self, name: str, weight: Tensor, rank: int) -> GradientForm:  # noqa: D102
        return ExactForm((weight.shape[0], weight.shape[1]), self.device)


class ModuleAccumulator:
    """Sums of one module's gradients over the calibration losses.

    Args:
        form: how gradients are kept.
        halves: keep even and odd losses apart, for `noise`.
        shape: (m, n).
    """

    def __init__(self, form: GradientForm, shape: tuple[int, int], halves: bool) -> None:
        self._form, self.shape = form, shape
        self._sums = [form.zeros() for _ in range(2 if halves else 1)]
        self.received = torch.zeros(())  # gradients taken: stays 0 where the calibration losses do not use the module
        self.losses = torch.zeros(len(self._sums))  # losses in each half, set when all have been seen

    def add(self, gradient: Tensor, index: int) -> None:
        """Take the gradient [m, n] of the loss with this index."""
        for total, part in zip(self._sums[index % len(self._sums)], self._form.compress(gradient), strict=True):
            total.add_(part.to(total.device))
        self.received += 1

    def tensors(self) -> list[Tensor]:
        """Everything that has been summed: may itself be summed over ranks, in place."""
        sums = [tensor for half in self._sums for tensor in half]
        return [*sums, self.received, self.losses]

    def has_signal(self) -> bool:
        """Whether any kept sum of gradients is not zero."""
        return any(bool(tensor.any()) for half in self._sums for tensor in half)

    def mean(self) -> Gradient:
        """Mean gradient over the losses."""
        return self._combine([1.0 / float(self.losses.sum())] * len(self._sums))

    def noise(self) -> Gradient:
        """The halves' means subtracted: no signal is left, and the sampling noise has the variance of that in `mean`.

        With a and b losses in the halves, N = a + b, it is sqrt(b / a) / N * sum_even - sqrt(a / b) / N * sum_odd;
        half the difference of the two means if a = b.

        Raises:
            CalibrationError: if there were fewer than two losses.
        """
        even, odd = (float(count) for count in self.losses)
        if min(even, odd) == 0:
            raise CalibrationError(
                "this scorer compares two halves of the calibration losses, but there was only one loss: calibrate "
                "with at least two micro-batches (more rollouts, or a smaller micro-batch)."
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
