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
    """

    def __init__(self) -> None:
        self.signals = StopSignals()
        self.listeners: list[Callable[[int, int, int], None]] = []

    @property
    def rank(self) -> int:
        """Number of this process."""
        return 0

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return 1

    @property
    def step(self) -> int:
        """Optimizer steps that were made."""
        return 0

    @property
    def steps_left(self) -> float:
        """Optimizer steps that the run will still make, or infinity."""
        return math.inf

    @property
    def accumulate_grad_batches(self) -> int:
        """Micro-batches of an optimizer step, which can change between epochs."""
        return 1

    @property
    def device(self) -> torch.device | None:
        """The device that trains; None: where the model is."""
        return None

    @property
    def is_training(self) -> bool:
        """Whether all ranks are in the training loop, in which they complete equally often."""
        return False

    @property
    def is_resumed(self) -> bool:
        """Whether training continues from a checkpoint."""
        return False

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
