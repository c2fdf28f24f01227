"""Collect the candidates' mean gradients in one calibration pass: each gradient is taken when it is ready, added up and freed.

A hook on each candidate's weight hands the gradient to that module's accumulator as soon as the backward pass has made it, and
frees it, so that the whole gradients of all candidates are never there together. A `GradientMode` decides how much of each is
kept in the sums: all of it (`ExactGradients`) or a sketch (`SketchedGradients`, in sketch.py). Either is a linear function of the
gradient (a `GradientForm`), so gradients of micro-batches are added up in that form. Only the candidates' weights get gradients.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_lightning.adapters.scoring_process import CalibrationState, ScoringProcess, only_candidates_trainable
from hybrid_lightning.adapters.scoring_progress import ScoringProgress
from hybrid_lightning.adapters.statistics import ExactGradient, Gradient
from hybrid_lightning.configurable import Configurable
from hybrid_lightning.errors import CalibrationError, ModelError
from hybrid_lightning.stopping import RunStopped


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
    """Keeps the whole gradient.

    Args:
        shape: (m, n).
        device: Where sums are kept.
    """

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
        """Choose how the gradient of one module is kept.

        Args:
            name: Full dotted name of the module.
            weight: Weight of the module, [m, n].
            rank: LoRA rank at which the module will be scored; 0 if it would have no LoRA.
        """


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
    """Sums of one module's gradients over the calibration losses.

    Args:
        form: How gradients are kept.
        shape: (m, n).
        halves: Whether to keep even and odd losses apart, as `noise` needs.
    """

    def __init__(self, form: GradientForm, shape: tuple[int, int], halves: bool) -> None:
        self._form, self.shape = form, shape
        self._sums = [form.zeros() for _ in range(2 if halves else 1)]
        self.received = torch.zeros(())  # number of gradients added: stays 0 where no calibration loss uses the module
        self.losses = torch.zeros(len(self._sums))  # number of losses in each half (or in all), set after the last loss

    def add(self, gradient: Tensor, index: int) -> None:
        """Add the gradient [m, n] of the loss with this index."""
        for total, part in zip(self._sums[index % len(self._sums)], self._form.compress(gradient), strict=True):
            total.add_(part.to(total.device))
        self.received += 1

    def tensors(self) -> list[Tensor]:
        """All sums and counts, which may be summed over ranks in place."""
        sums = [tensor for half in self._sums for tensor in half]
        return [*sums, self.received, self.losses]

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


def collect_gradients(
    model: nn.Module,
    candidates: Mapping[str, nn.Module],
    losses: Iterable[Tensor],
    mode: GradientMode,
    ranks: Mapping[str, int],
    *,
    halves: bool = False,
    kept: ScoringProgress | None = None,
    on_loss: Callable[[int], None] | None = None,
    process: ScoringProcess | None = None,
) -> dict[str, ModuleAccumulator]:
    """Average the candidates' gradients over the calibration losses.

    Meanwhile the model is in eval mode (no dropout). transformers does gradient checkpointing in train mode only, so blocks
    with gradient checkpointing are put in train mode themselves, but not the modules inside them, which hold the dropout. At
    the end, and after an error too, `requires_grad` flags, modes and earlier gradients are restored.

    Args:
        model: The start policy, with floating-point weights.
        candidates: Full dotted name -> linear module.
        losses: Scalar losses, each with the same weight. They have to be computed lazily, while this function iterates over them:
            the backward pass of each frees its graph.
        mode: How much of each gradient to keep.
        ranks: Full dotted name -> LoRA rank, which sets the size of sketches.
        halves: Whether to keep even and odd losses apart.
        kept: Saved progress of scoring: holds the sums of a stopped run, says which modules have their score already, and saves
            the sums of this run. The losses that a stopped run has seen are skipped if they follow `CalibrationState`; others are
            computed again, without a backward pass.
        on_loss: Called after each loss with the number of losses seen so far.
        process: Shares the work with other processes; None: this one is alone.

    Returns:
        Full dotted name -> accumulator of that module; modules that have their score already, or that another process scores,
        are left out.

    Raises:
        ModelError: If a weight cannot have a gradient, as in a quantized model.
        CalibrationError: If there is no loss, a loss or gradient is not finite, or all gradients are zero.
    """
    kept = kept or ScoringProgress()
    process = process or ScoringProcess()
    modules = process.modules(candidates)
    for name, module in candidates.items():
        check_weight(name, module)
    without_score = [name for name in candidates if name not in kept.scores]
    if not without_score:
        return {}
    accumulators = {}
    for name in process.own(without_score):
        weight: Tensor = modules[name].weight  # type: ignore[assignment]
        form = mode.form(name, weight, ranks[name])
        accumulators[name] = ModuleAccumulator(form, (weight.shape[0], weight.shape[1]), halves)
    seen = _restore(accumulators, losses, kept)

    def add(name: str, gradient: Tensor, index: int) -> None:
        if name in accumulators:
            accumulators[name].add(gradient, index)

    with only_candidates_trainable(model, modules), torch.enable_grad():
        try:
            for number in process.backward_all(candidates, add, losses, seen, kept):
                seen = number
                if on_loss is not None:
                    on_loss(seen)
                save_progress(kept, accumulators, losses, seen)
        except RunStopped:
            save_progress(kept, accumulators, losses, seen, stopped=True)
            raise
    counts = [seen] if not halves else [(seen + 1) // 2, seen // 2]
    for accumulator in accumulators.values():
        accumulator.losses.copy_(torch.tensor(counts, dtype=torch.float32))
    _check_signal(accumulators, seen, len(without_score), process)
    return accumulators


def save_progress(
    kept: ScoringProgress, accumulators: Mapping[str, ModuleAccumulator], losses: object, seen: int, stopped: bool = False
) -> None:
    """Save the sums over the first `seen` losses, and the state that the remaining losses need, if saving is due."""

    def state() -> dict[str, Any]:
        sums = {name: accumulator.tensors() for name, accumulator in accumulators.items()}
        return {"seen": seen, "sums": sums, "losses": losses.state_dict() if isinstance(losses, CalibrationState) else {}}

    kept.keep_sums(state, stopped)


def _restore(accumulators: Mapping[str, ModuleAccumulator], losses: object, kept: ScoringProgress) -> int:
    """Restore the sums of a stopped run; returns the number of losses that they contain."""
    state = kept.sums()
    if state is None:
        return 0
    if isinstance(losses, CalibrationState):
        losses.load_state_dict(state["losses"])
    for name, accumulator in accumulators.items():
        for tensor, value in zip(accumulator.tensors(), state["sums"][name], strict=True):
            tensor.copy_(value)
    return int(state["seen"])


def check_weight(name: str, module: nn.Module) -> None:
    """Raise ModelError if the weight of a module cannot have a gradient."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if not weight.is_floating_point():
        raise ModelError(f"the weight of {name} is {weight.dtype}: score the model before it is quantized.")


def _check_signal(accumulators: dict[str, ModuleAccumulator], losses: int, candidates: int, process: ScoringProcess) -> None:
    if not losses:
        raise CalibrationError("there are no calibration losses or no candidates: give at least one of each.")

    def check_finite() -> dict[str, None]:
        for name, accumulator in accumulators.items():
            if not all(bool(torch.isfinite(tensor).all()) for tensor in accumulator.tensors()):
                raise CalibrationError(
                    f"the calibration gradient of {name} is not finite: use bfloat16 or float32 for scoring, or look for "
                    "inf or nan in the calibration data."
                )
        return {}

    process.together(check_finite)
    if not process.any(any(accumulator.has_signal() for accumulator in accumulators.values())):
        raise CalibrationError(
            f"the calibration gradient is zero in all {candidates} candidate modules, as when all rewards of "
            "each prompt tie: use more prompts, prompts that are solved sometimes, more samples per prompt, or "
            "reference answers."
        )
