"""Communication between the processes (ranks) of a run, and the norm of gradients that are split over ranks.

All ranks must call each of these functions, in the same order. In a run with one process they return their argument at no cost.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hybrid_lightning.errors import CalibrationError, CheckpointError
from hybrid_lightning.shared.stopping import RunStopped, StopSignals

Result = TypeVar("Result")


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if world_size() > 1 else 0


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks; a value can be anything that can be pickled, with tensors on the CPU."""
    values: list[Any] = [None] * world_size()
    if len(values) == 1:
        return [value]
    dist.all_gather_object(values, value)
    return values


def first_rank_does(function: Callable[[], None]) -> None:
    """Let rank 0 write something while the others wait; a failure is raised on all ranks, so that none waits forever.

    Raises:
        CheckpointError: If the function raises; with its message.
    """
    failure: list[str | None] = [None]
    cause: Exception | None = None
    if rank() == 0:
        try:
            function()
        except Exception as error:
            failure, cause = [f"{type(error).__name__}: {error}"], error
    if world_size() > 1:
        dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise CheckpointError(failure[0]) from cause


def on_all_ranks(function: Callable[[], Result], signals: StopSignals, purpose: str) -> list[Result]:
    """Results of a function on each rank (picklable, with tensors on the CPU), where it may fail or be stopped.

    `purpose` describes the call, in words that follow "could not".

    Raises:
        RunStopped: If one rank received a stop request.
        CalibrationError: If it failed only on another rank; where it failed, its own error is raised.
    """
    result: Any = None
    failure: Exception | None = None
    try:
        result = function()
    except RunStopped:
        pass  # `requested` records it
    except Exception as error:
        failure = error
    answers = gather_objects((result, None if failure is None else f"{type(failure).__name__}: {failure}", signals.requested))
    if number := max(requested for _, _, requested in answers):
        raise RunStopped(number, together=True)
    if failure is not None:
        raise failure
    for rank, (_, failed, _) in enumerate(answers):
        if failed is not None:
            raise CalibrationError(f"rank {rank} could not {purpose}: {failed}")
    return [found for found, _, _ in answers]


def gather_counts(count: int, device: torch.device) -> list[int]:
    """The numbers of all ranks; `device` is the device on which the ranks train."""
    ranks = world_size()
    if ranks == 1:
        return [count]
    counts = torch.zeros(ranks, dtype=torch.long, device=device)
    counts[dist.get_rank()] = count
    dist.all_reduce(counts)
    return [int(value) for value in counts.tolist()]


def check_stop(signals: StopSignals, device: torch.device) -> None:
    """Raise `RunStopped` on all ranks if one of them received a stop request; `device` is the device on which the ranks train."""
    number = max(gather_counts(signals.requested, device))
    if number:
        raise RunStopped(number, together=True)


def gather_columns(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Concatenate the rows of all ranks: name -> [B], the same names and B on every rank, becomes name -> [ranks * B]."""
    ranks = world_size()
    if ranks == 1:
        return dict(columns)
    mine = torch.stack([column.double() for column in columns.values()])
    parts = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(parts, mine)
    rows = torch.cat(parts, dim=1)
    return {name: row.to(column.dtype) for (name, column), row in zip(columns.items(), rows, strict=True)}


def own_rows(rows: Tensor) -> Tensor:
    """The rows of this rank, out of the rows that `gather_columns` has concatenated."""
    ranks = world_size()
    return rows if ranks == 1 else rows.tensor_split(ranks)[dist.get_rank()]


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum over ranks; the argument is not changed."""
    if world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


def largest_over_ranks(values: Tensor) -> Tensor:
    """The largest value over ranks, for each entry; the argument is not changed."""
    if world_size() == 1:
        return values
    largest = values.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def send_trained_weights(model: nn.Module, device: torch.device) -> None:
    """Give every rank the trained weights of rank 0, since each rank may have initialized LoRA with other random numbers.

    All other weights are the same on all ranks. `device` is the device on which the ranks train.
    """
    if world_size() == 1:
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            value = parameter.detach().to(device)
            dist.broadcast(value, src=0)
            parameter.data.copy_(value)


def total_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Norm of all gradients together, the same on every rank.

    Args:
        gradients: The gradients of this rank, in float32, which may be on the CPU.
        device: The device on which the ranks train; the result is on it.
    """
    norm = torch.nn.utils.get_total_norm(gradients)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).to(device)
