"""Where a module's gradients go, one micro-batch after another: linear forms of G, so that sums over micro-batches
(and ranks) are sums of forms.

One calibration pass: each candidate's gradient is taken the moment it is ready, added up and freed.

The candidates' gradients are therefore never in memory together: what remains of each is what its accumulator keeps
(all of it, or a sketch). Only the candidates' weights get gradients.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hybrid_lightning.adapters.kept_scoring import KeptScoring
from hybrid_lightning.adapters.statistics import ExactGradient, Gradient
from hybrid_lightning.configurable import Configurable
from hybrid_lightning.errors import CalibrationError, ConfigError, ModelError
from hybrid_lightning.stopping import RunStopped


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


class GradientMode(Configurable, ABC):
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


@runtime_checkable
class CalibrationState(Protocol):
    """What losses may offer, so that scoring that was stopped goes on after those that it has seen."""

    def since(self, seen: int) -> Iterator[Tensor]:
        """The losses after so many."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What later losses, and later passes over all of them, have to know of those so far."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        ...


def collect_gradients(
    model: nn.Module,
    candidates: Mapping[str, nn.Module],
    losses: Iterable[Tensor],
    mode: GradientMode,
    rank: int,
    *,
    halves: bool = False,
    sum_over_ranks: Callable[[Tensor], object] | None = None,
    kept: KeptScoring | None = None,
    on_loss: Callable[[int], None] | None = None,
) -> dict[str, ModuleAccumulator]:
    """Average the candidates' gradients over the calibration losses.

    The model is in eval mode meanwhile (no dropout). Where gradient checkpointing is on, which transformers honours in
    train mode only, the checkpointing blocks themselves are in train mode, but not the modules in them, which hold the
    dropout. Flags, modes and any gradients that were there are restored at the end, also after an error.

    Args:
        model: the start policy, with floating-point weights.
        candidates: full dotted name -> linear module.
        losses: scalar losses, computed one after another while this function iterates over them, since each graph is
            freed by its backward pass. All count the same.
        mode: how much of each gradient to keep.
        rank: LoRA rank (sketches are sized by it).
        halves: keep even and odd losses apart.
        sum_over_ranks: sums a tensor over processes in place, such as `torch.distributed.all_reduce`; each process
            then gives losses of its own, and all get the same result.
        kept: where sums are kept when the run is stopped, and which modules need none any more. Losses that it has seen are
            left out (see `CalibrationState`); without `since` they are computed once more, without a backward pass.
        on_loss: called with the number of losses that have been seen, after each.

    Returns:
        Full dotted name -> sums of that module.

    Raises:
        ModelError: if a weight cannot have a gradient, as in a quantized model.
        CalibrationError: if there is no loss, a loss or gradient is not finite, or all gradients are zero.
    """
    kept = kept or KeptScoring()
    assert sum_over_ranks is None or kept.folder is None, "sums over ranks would be summed up again by a run that goes on"
    accumulators = {}
    for name, module in candidates.items():
        weight: Tensor = module.weight  # type: ignore[assignment]
        if not weight.is_floating_point():
            raise ModelError(f"the weight of {name} is {weight.dtype}: score the model before it is quantized.")
        if name not in kept.scores:
            form = mode.form(name, weight, rank)
            accumulators[name] = ModuleAccumulator(form, (weight.shape[0], weight.shape[1]), halves)
    if not accumulators:
        return {}
    seen = _restore(accumulators, losses, kept)
    with _only_candidates_trainable(model, candidates), torch.enable_grad():
        try:
            for number in _backward_all(candidates, accumulators, losses, seen, kept):
                seen = number
                if on_loss is not None:
                    on_loss(seen)
        except RunStopped:
            keep_sums(kept, accumulators, losses, seen, stopped=True)
            raise
    counts = [seen] if not halves else [(seen + 1) // 2, seen // 2]
    for accumulator in accumulators.values():
        accumulator.losses.copy_(torch.tensor(counts, dtype=torch.float32))
        if sum_over_ranks is not None:
            for tensor in accumulator.tensors():
                sum_over_ranks(tensor)
    _check_signal(accumulators)
    return accumulators


def keep_sums(
    kept: KeptScoring, accumulators: Mapping[str, ModuleAccumulator], losses: object, seen: int, stopped: bool = False
) -> None:
    """Keep what has been summed up of so many losses, and what later ones have to know of them."""

    def state() -> dict[str, Any]:
        sums = {name: accumulator.tensors() for name, accumulator in accumulators.items()}
        return {"seen": seen, "sums": sums, "losses": losses.state_dict() if isinstance(losses, CalibrationState) else {}}

    kept.keep_sums(state, stopped)


def _restore(accumulators: Mapping[str, ModuleAccumulator], losses: object, kept: KeptScoring) -> int:
    """Take over what is kept; returns how many losses it has seen."""
    state = kept.sums()
    if state is None:
        return 0
    if isinstance(losses, CalibrationState):
        losses.load_state_dict(state["losses"])
    for name, accumulator in accumulators.items():
        for tensor, value in zip(accumulator.tensors(), state["sums"][name], strict=True):
            tensor.copy_(value)
    return int(state["seen"])


def _backward_all(
    candidates: Mapping[str, nn.Module],
    accumulators: dict[str, ModuleAccumulator],
    losses: Iterable[Tensor],
    seen: int,
    kept: KeptScoring,
) -> Iterator[int]:
    """Run each loss that has not been seen backward into the accumulators; yields how many have been."""
    index = seen

    def take_gradient(name: str) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            assert weight.grad is not None
            # off, in case the losses were yielded from within autocast: sums and sketches are float32
            with torch.autocast(weight.device.type, enabled=False):
                if name in accumulators:
                    accumulators[name].add(weight.grad.detach(), index)
            weight.grad = None

        return hook

    handles = [
        module.weight.register_post_accumulate_grad_hook(take_gradient(name))  # type: ignore[operator, union-attr]
        for name, module in candidates.items()
    ]
    try:
        for loss in losses.since(index) if isinstance(losses, CalibrationState) else islice(losses, index, None):
            _check_loss(loss, index)
            with kept.signals.deferred():  # the sums have all of a loss or nothing
                loss.backward()  # type: ignore[no-untyped-call]
                index += 1
                yield index
                keep_sums(kept, accumulators, losses, index)
            kept.signals.check()
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _only_candidates_trainable(model: nn.Module, candidates: Mapping[str, nn.Module]) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for parameter, _, _ in flags:
            parameter.requires_grad_(False)
            parameter.grad = None
        for module in candidates.values():
            module.weight.requires_grad_(True)  # type: ignore[operator, union-attr]
        for module, _ in modes:
            module.training = bool(getattr(module, "gradient_checkpointing", False))
        yield
    finally:
        for parameter, flag, gradient in flags:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        for module, training in modes:
            module.training = training


def _check_loss(loss: Tensor, index: int) -> None:
    if loss.numel() != 1:
        raise ConfigError(f"calibration loss {index} has shape {tuple(loss.shape)}: give scalar losses.")
    if not loss.requires_grad:
        raise CalibrationError(
            f"calibration loss {index} does not depend on the weight of any candidate module: compute it from the "
            "output of the model that is scored, with gradients enabled."
        )
    if not torch.isfinite(loss):
        raise CalibrationError(
            f"calibration loss {index} is {loss.item()}: look for inf or nan in the calibration data, or use bfloat16 "
            "or float32 where the model is float16."
        )


def _check_signal(accumulators: dict[str, ModuleAccumulator]) -> None:
    some = next(iter(accumulators.values()), None)
    if some is None or float(some.losses.sum()) == 0:
        raise CalibrationError("there are no calibration losses or no candidates: give at least one of each.")
    for name, accumulator in accumulators.items():
        if not all(bool(torch.isfinite(tensor).all()) for tensor in accumulator.tensors()):
            raise CalibrationError(
                f"the calibration gradient of {name} is not finite: use bfloat16 or float32 for scoring, or look for "
                "inf or nan in the calibration data."
            )
    if not any(accumulator.has_signal() for accumulator in accumulators.values()):
        raise CalibrationError(
            f"the calibration gradient is zero in all {len(accumulators)} candidate modules, as when all rewards of "
            "each prompt tie: use more prompts, prompts that are solved sometimes, more samples per prompt, or "
            "reference answers."
        )
