"""`RunContext`: what rollouts ask of the run that they belong to."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hybrid_lightning.stopping import StopSignals


class RunContext:
    """What rollouts ask of the run that they belong to: here the answers without a Trainer, of one process.

    Attributes:
        signals: How the run is asked to stop.
        listeners: Called while completions are made, with (sequences still running, tokens decoded, `max_new_tokens`).
        rank: Number of this process.
        world_size: Number of processes.
        step: Optimizer steps that were made.
        steps_left: Optimizer steps that the run will still make, or infinity.
        accumulate_grad_batches: Micro-batches of an optimizer step, which can change between epochs.
        device: The device that trains; None: where the model is.
        is_training: Whether all ranks are in the training loop, in which they complete equally often.
        is_resumed: Whether training continues from a checkpoint.
    """

    rank, world_size, step = 0, 1, 0
    steps_left: float = math.inf
    accumulate_grad_batches = 1
    device: torch.device | None = None
    is_training = is_resumed = False

    def __init__(self) -> None:
        self.signals = StopSignals()
        self.listeners: list[Callable[[int, int, int], None]] = []

    def check_stop(self) -> None:
        """Raise `RunStopped` on all ranks if one of them has been asked to stop. All ranks have to call it."""
        self.signals.check()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum over ranks. All ranks have to call it."""
        return values

    def gather_over_ranks(self, value: Any) -> list[Any]:
        """The values of all ranks. All ranks have to call it."""
        return [value]

    def restart_epoch(self) -> None:
        """Count the micro-batches of the epoch from 0: called when a resumed run finds other training prompts."""
