"""`ScoringProcess`: the backward passes of scoring, and which modules a process scores: all, where it is alone.

Processes that have split the model share the work (`training/sharded_scoring.py`): each runs the passes of other losses, gets the
gradients of some modules from all of them, in the order of the losses, and scores these modules.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from hybrid_lightning.adapters.scoring_progress import ScoringProgress
from hybrid_lightning.errors import CalibrationError, ConfigError, ModelError

Result = TypeVar("Result")


@runtime_checkable
class CalibrationState(Protocol):
    """Methods that calibration losses may have, so that stopped scoring resumes after the losses that it has seen."""

    def since(self, seen: int) -> Iterator[Tensor]:
        """The losses that follow the first `seen`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """State that the remaining losses, and later passes over all losses, need."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...


class ScoringProcess:
    """A process that scores alone. All methods are collective: of several processes each has to call them.

    Args:
        progress: What is saved of the scores, and was by a stopped run; its signals stop the run. None saves nothing.
        on_loss: Called after each loss with the number of losses seen so far; of a scorer of updates, over all turns.
    """

    is_first = True  # whether it is the one that says what there is to say
    loss_scale = 1.0  # factor of losses in backward passes; in float16 gradients below 6e-8 are 0 without one

    def __init__(self, progress: ScoringProgress | None = None, on_loss: Callable[[int], None] | None = None) -> None:
        self.progress = progress or ScoringProgress()
        self.on_loss = on_loss or (lambda seen: None)

    def modules(self, candidates: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
        """The modules that the passes go through, by the names of the candidates."""
        return candidates

    def weight(self, name: str, module: nn.Module) -> Tensor:
        """The weight [m, n] of a candidate that this process scores; shares memory with the model that is evaluated."""
        return module.weight.detach()  # type: ignore[operator, union-attr]

    def own(self, names: Iterable[str]) -> list[str]:
        """Those of some candidates whose gradients this process gets, and which it scores."""
        return list(names)

    def rounds(self, names: Iterable[str]) -> list[list[str]]:
        """Candidates in the order in which they are scored, those together that the processes score at the same time."""
        return [[name] for name in names]

    def together(self, function: Callable[[], Mapping[str, Result]]) -> dict[str, Result]:
        """Call a function on each process, and unite what they return; an error of one is raised on all."""
        return dict(function())

    def finish(self, function: Callable[[], dict[str, Result]]) -> dict[str, Result]:
        """Call a function that returns what this process alone has; an error of one is raised on all."""
        return function()

    def any(self, value: bool) -> bool:
        """Whether it is true on any process."""
        return value

    def measure(
        self,
        name: str,
        module: nn.Module,
        function: Callable[[Tensor, Callable[[], float]], Result],
        losses: Iterable[Tensor],
    ) -> dict[str, Result]:
        """Call a function that changes a candidate's weight and looks at the loss; what it returned, by the candidate's name.

        It is called where the candidate is scored, with the weight [m, n], which it may change until it returns, and with what
        measures the mean of the scalar losses at the changed weight, which are computed anew each time.
        """
        return self.together(lambda: {name: function(self.weight(name, module), partial(_mean_loss, losses))})

    def check_loss(self, loss: Tensor, index: int) -> None:
        """Raise an error if a loss cannot be differentiated."""
        if loss.numel() != 1:
            raise ConfigError(f"calibration loss {index} has shape {tuple(loss.shape)}; give scalar losses")
        if not loss.requires_grad:
            raise CalibrationError(
                f"calibration loss {index} does not depend on the weight of any candidate module; compute it from the "
                "output of the model that is scored, with gradients enabled"
            )
        if not torch.isfinite(loss):
            raise CalibrationError(
                f"calibration loss {index} is {loss.item()}; look for inf or nan in the calibration data, or use bfloat16 "
                "or float32 where the model is float16"
            )

    def backward_all(
        self,
        candidates: Mapping[str, nn.Module],
        take: Callable[[str, Tensor, int], None],
        losses: Iterable[Tensor],
        seen: int,
        some: bool = False,
    ) -> Iterator[int]:
        """Run the backward pass of each scalar loss after those that have been `seen`, and free each gradient once it is taken.

        Only the candidates' weights have gradients. `take` is called with the name of a candidate, its gradient [m, n] and the
        number of the loss, counted from 0. `some` says that there are other candidates, so that a loss need not use any of these.

        Yields:
            The number of losses seen. A signal stops the run between losses, after what is done at the `yield`.
        """
        index, signals = seen, self.progress.signals

        def take_gradient(name: str) -> Callable[[Tensor], None]:
            def hook(weight: Tensor) -> None:
                assert weight.grad is not None
                # Losses may be yielded from within autocast, but sums and sketches are float32.
                with torch.autocast(weight.device.type, enabled=False):
                    take(name, self._unscaled(weight.grad.detach()), index)
                weight.grad = None

            return hook

        handles = [
            module.weight.register_post_accumulate_grad_hook(take_gradient(name))  # type: ignore[operator, union-attr]
            for name, module in candidates.items()
        ]
        try:
            for loss in losses.since(index) if isinstance(losses, CalibrationState) else islice(losses, index, None):
                used = loss.requires_grad or not some
                if used:
                    self.check_loss(loss, index)
                with signals.deferred():  # a loss is in the sums of all modules or of none
                    if used:
                        self._differentiate(loss)
                    index += 1
                    yield index
                signals.check()
        finally:
            for handle in handles:
                handle.remove()

    def _differentiate(self, loss: Tensor) -> None:
        scaled = loss if self.loss_scale == 1 else loss * self.loss_scale
        scaled.backward()  # type: ignore[no-untyped-call]

    def _unscaled(self, gradient: Tensor) -> Tensor:
        return gradient if self.loss_scale == 1 else gradient.float() / self.loss_scale


@contextmanager
def only_candidates_trainable(model: nn.Module, candidates: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within this context only the candidates' weights get gradients, and the model is in eval mode (see `collect_gradients`)."""
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


def check_weight(name: str, module: nn.Module) -> None:
    """Raise ModelError if the weight of a module cannot have a gradient."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if not weight.is_floating_point():
        raise ModelError(f"the weight of {name} is {weight.dtype}; score the model before it is quantized")


def _mean_loss(losses: Iterable[Tensor]) -> float:
    with torch.no_grad():
        values = [float(loss) for loss in losses]
    if not values:
        raise CalibrationError(
            "the calibration losses can be iterated over only once, but this scorer measures them; give losses that are computed "
            "anew each time"
        )
    return sum(values) / len(values)
