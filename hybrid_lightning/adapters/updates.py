"""What some optimizer steps would change in each candidate, of which none is taken.

A stand-in takes the place of each candidate's weight in the optimizer: a float32 matrix of zeros, which gets the gradients that
the weight has at the start policy. After N steps it holds the sum of what the optimizer would have moved. So weights, and
whatever else the run has, stay as they are, to the bit.

Why not take the steps: in trials of the project's study (results/study/README.md) the tails of 8 such steps of Adam had a rank
correlation of 0.88 to 0.96 with those of W_32 - W_0 of full fine-tuning (0.61 to 0.91 among MLPs alone). LoRA of rank 16, the
other way to little memory, had 0.83 to 0.89 (0.45 to 0.69).

A candidate's stand-in does not depend on the others', so they are made some at a time, in turns that need no more memory for
stand-ins, gradients and optimizer state than the training that follows has for its trained weights. Each turn computes the losses
of all steps anew.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hybrid_lightning.adapters.scoring_process import ScoringProcess, check_weight, only_candidates_trainable
from hybrid_lightning.adapters.statistics import ExactGradient, Gradient
from hybrid_lightning.errors import CalibrationError


@dataclass(frozen=True)
class OptimizerSteps:
    """The steps of which an update is the sum."""

    make_optimizer: Callable[[list[nn.Parameter]], Optimizer]  # makes the run's optimizer of stand-ins, [m, n] float32 each
    most: int  # weights of a turn: as many as the training that follows trains


@runtime_checkable
class StepLosses(Protocol):
    """Losses of several optimizer steps; where there is no such attribute, each loss is one step."""

    step_ends: tuple[int, ...]  # numbers of losses, counted from the first one, after which a step ends


def turns_of(candidates: Mapping[str, nn.Module], most: int) -> list[list[str]]:
    """Divide candidates into turns of at most so many weights, in their order; a larger module has a turn of its own."""
    turns: list[list[str]] = []
    room = 0
    for name, module in candidates.items():
        size = module.weight.numel()  # type: ignore[operator, union-attr]
        if size > room or not turns:
            turns.append([])
            room = most
        turns[-1].append(name)
        room -= size
    return turns


def updates_in_turns(
    model: nn.Module,
    candidates: Mapping[str, nn.Module],
    losses: Iterable[Tensor],
    steps: OptimizerSteps,
    process: ScoringProcess,
) -> Iterator[dict[str, Gradient]]:
    """Sum up the steps that an optimizer would make at the start policy, which is unchanged afterwards.

    The losses are computed anew each time that they are iterated over; `StepLosses` say where steps end.

    Yields:
        For those candidates of each turn that this process scores: full dotted name -> sum of the steps, [m, n]; emptied when the
        next turn begins.

    Raises:
        ModelError: If a weight cannot have a gradient, as in a quantized model.
        CalibrationError: If there is no loss, or a loss or an update is not finite.
    """
    ends = frozenset(losses.step_ends) if isinstance(losses, StepLosses) else None
    seen = 0
    for names in turns_of(candidates, steps.most):
        turn = {name: candidates[name] for name in names}
        for name, module in turn.items():
            check_weight(name, module)
        modules = process.modules(turn)
        stand_ins = {name: _stand_in(modules[name]) for name in process.own(names)}
        optimizer = steps.make_optimizer(list(stand_ins.values())) if stand_ins else None  # of nothing is none
        before = seen
        with only_candidates_trainable(model, modules), torch.enable_grad():
            for number in process.backward_all(turn, partial(_add, stand_ins), losses, 0, some=True):
                if optimizer is not None and (ends is None or number in ends):
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=False)
                seen += 1
                process.on_loss(seen)
        if seen == before:
            raise CalibrationError(
                "there are no calibration losses, or they can be iterated over only once; give at least one, and losses that are "
                "computed anew each time, since each turn of modules needs all of them"
            )
        del optimizer  # and its state
        updates = process.finish(partial(_updates, stand_ins))
        stand_ins.clear()
        yield updates
        updates.clear()  # whoever has them still holds the dict while the next turn is made


def _stand_in(module: nn.Module) -> nn.Parameter:
    weight: Tensor = module.weight  # type: ignore[assignment]
    stand_in = nn.Parameter(torch.zeros(weight.shape, dtype=torch.float32, device=weight.device))
    stand_in.grad = torch.zeros_like(stand_in)  # an optimizer skips what has none
    return stand_in


def _updates(stand_ins: Mapping[str, nn.Parameter]) -> dict[str, Gradient]:
    for name, stand_in in stand_ins.items():
        stand_in.grad = None
        if not torch.isfinite(stand_in).all():
            raise CalibrationError(
                f"the update of {name} is not finite; use bfloat16 or float32 for scoring, a smaller model.lr_full, or look for "
                "inf or nan in the calibration data"
            )
    return {name: ExactGradient(stand_in.detach()) for name, stand_in in stand_ins.items()}


def _add(stand_ins: Mapping[str, nn.Parameter], name: str, gradient: Tensor, index: int) -> None:
    total = stand_ins[name].grad
    assert total is not None
    total.add_(gradient)
