"""Scoring by all ranks of FSDP2 together; no rank holds the full model on its device except while sampling.

Each rank has the loaded model in host memory. For scoring, a copy of its structure that shares these weights is split over the
devices, as the adapted model will be later. The ranks run the passes of different losses at the same time. FSDP2 reduces the
gradients, which are then gathered module by module, and each rank adds up and scores the gradients of some modules. The scores
equal one process's scores up to rounding, since sums are computed in a different order. Afterwards the copy is discarded.
"""

import copy
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from hybrid_lightning.adapters.gradients import matrices_of
from hybrid_lightning.adapters.scoring import Scoring
from hybrid_lightning.sharding.fsdp2 import FSDP2Strategy
from hybrid_lightning.sharding.ranks import on_all_ranks, world_size
from hybrid_lightning.shared.stopping import StopSignals
from hybrid_lightning.training.task import Task

Result = TypeVar("Result")
_PURPOSE = "score the modules"


@contextmanager
def split_copy(task: Task, strategy: FSDP2Strategy) -> Iterator[nn.Module]:
    """Context for all ranks in which a task's policy computes with a split copy of its model, which is not adapted yet."""
    from hybrid_lightning.runner import use_fused_layers  # PEFT is slow to import

    policy = task.policy
    policy.choose_products(strategy.root_device)
    whole, backend = policy.model, policy.runner.backend
    split = _same_weights(whole, backend)
    use_fused_layers(split, backend)  # as in training, since scoring's passes are as large
    with task.run.signals.deferred():
        policy.set_model(strategy.shard(split), is_copy=True, device=strategy.root_device)
        try:
            task.prepare_passes()
            yield split
        finally:
            policy.set_model(whole, is_copy=True)
            del split
            if strategy.root_device.type != "cpu":
                gc.collect()  # collects FSDP's cycles, so that the device has its memory back; takes some tenths of a second


def _same_weights(model: nn.Module, shared: object) -> nn.Module:
    """A copy of a model with the same memory for its weights; the copies also share `shared`."""
    memo: dict[int, Any] = {id(shared): shared}
    memo |= {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in model.parameters()}
    memo |= {id(buffer): buffer.detach() for buffer in model.buffers()}  # a new tensor, which may move to another device
    return copy.deepcopy(model, memo)


class ShardedScoring(Scoring):
    """Scoring by one of the ranks of FSDP2; all ranks get all scores.

    Args:
        split: The split copy of the model.
        signals: Signals of this process, which stop all ranks.
        arguments: The arguments of `Scoring` without the model. The candidates are modules of the whole model, in host memory,
            and the losses can be computed in any order: they have a length and are indexed by number.
    """

    def __init__(self, split: nn.Module, *arguments: Any, signals: StopSignals) -> None:
        super().__init__(split, *arguments)
        self._split = {name: split.get_submodule(name) for name in self._candidates}
        self._signals, self._rank, self._ranks = signals, dist.get_rank(), world_size()
        self.prints = self._rank == 0
        sizes = {name: sum(weight.numel() for weight in matrices_of(module).values()) for name, module in self._split.items()}
        # Sorted by size, so that ranks have about the same amount to score.
        self._own = sorted(sizes, key=lambda name: -sizes[name])[self._rank :: self._ranks]
        # For experts that receive tokens only on some ranks; before torch 2.13, FSDP2 cannot reduce their gradients.
        getattr(split, "set_reduce_scatter_unused_params", lambda _: None)(True)

    def own(self) -> list[str]:
        """The candidates that this rank scores."""
        return self._own

    def modules(self) -> Mapping[str, nn.Module]:
        """The candidates in the split model, by name."""
        return self._split

    def together(self, function: Callable[[], dict[str, Result]]) -> dict[str, Result]:
        """The joined results of a function on all ranks. A signal interrupts it, and then stops all ranks."""

        def interruptible() -> dict[str, Result]:
            with self._signals.interruptible():
                return function()

        parts = on_all_ranks(interruptible, self._signals, _PURPOSE)
        return {name: value for part in parts for name, value in part.items()}

    def backward_all(self) -> Iterator[int]:
        """Run the backward passes of all losses, one loss per rank at a time, and add up gradients; yields the number done.

        A rank without a loss repeats the last one, since all ranks gather weights together.
        """
        losses: Any = self._losses
        weights = [(name, part, weight) for name, module in self._split.items() for part, weight in matrices_of(module).items()]
        for first in range(0, len(losses), self._ranks):
            mine = first + self._rank
            loss = losses[min(mine, len(losses) - 1)]
            on_all_ranks(partial(self.check_loss, loss, mine), self._signals, _PURPOSE)
            self.differentiate(loss if mine < len(losses) else 0 * loss)
            for name, part, weight in weights:
                if weight.grad is not None:
                    assert isinstance(weight.grad, DTensor)
                    mean = weight.grad.full_tensor()
                    weight.grad = None
                    if name in self._own:
                        self.add(name, part, mean.float() * self._ranks)
            yield min(first + self._ranks, len(losses))
