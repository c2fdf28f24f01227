"""One calibration pass: each candidate's gradient is taken the moment it is ready, added up and freed.

The candidates' gradients are therefore never in memory together: what remains of each is what its accumulator keeps
(all of it, or a sketch). Only the candidates' weights get gradients.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hybrid_lightning.adapters.accumulators import GradientMode, ModuleAccumulator
from hybrid_lightning.errors import CalibrationError, ConfigError, ModelError


def collect_gradients(
    model: nn.Module,
    candidates: Mapping[str, nn.Module],
    losses: Iterable[Tensor],
    mode: GradientMode,
    rank: int,
    *,
    halves: bool = False,
    sum_over_ranks: Callable[[Tensor], object] | None = None,
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

    Returns:
        Full dotted name -> sums of that module.

    Raises:
        ModelError: if a weight cannot have a gradient, as in a quantized model.
        CalibrationError: if there is no loss, a loss or gradient is not finite, or all gradients are zero.
    """
    accumulators = {}
    for name, module in candidates.items():
        weight: Tensor = module.weight  # type: ignore[assignment]
        if not weight.is_floating_point():
            raise ModelError(f"the weight of {name} is {weight.dtype}: score the model before it is quantized.")
        form = mode.form(name, weight, rank)
        accumulators[name] = ModuleAccumulator(form, (weight.shape[0], weight.shape[1]), halves)
    with _only_candidates_trainable(model, candidates), torch.enable_grad():
        counts = _backward_all(candidates, accumulators, losses)
    for accumulator in accumulators.values():
        accumulator.losses += torch.tensor([sum(counts)] if not halves else counts, dtype=torch.float32)
        if sum_over_ranks is not None:
            for tensor in accumulator.tensors():
                sum_over_ranks(tensor)
    _check_signal(accumulators)
    return accumulators


def _backward_all(
    candidates: Mapping[str, nn.Module], accumulators: dict[str, ModuleAccumulator], losses: Iterable[Tensor]
) -> list[int]:
    """Run each loss backward into the accumulators; returns how many had an even and an odd index."""
    index = 0

    def take_gradient(name: str) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            assert weight.grad is not None
            # off, in case the losses were yielded from within autocast: sums and sketches are float32
            with torch.autocast(weight.device.type, enabled=False):
                accumulators[name].add(weight.grad.detach(), index)
            weight.grad = None

        return hook

    handles = [
        module.weight.register_post_accumulate_grad_hook(take_gradient(name))  # type: ignore[operator, union-attr]
        for name, module in candidates.items()
    ]
    try:
        for loss in losses:
            _check_loss(loss, index)
            loss.backward()  # type: ignore[no-untyped-call]
            index += 1
    finally:
        for handle in handles:
            handle.remove()
    return [(index + 1) // 2, index // 2]


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
