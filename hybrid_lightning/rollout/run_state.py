"""`RunState`: what rollouts have to know of the run that they belong to."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybrid_lightning.stopping import StopSignals


@dataclass(frozen=True)
class RunState:
    """A run at one moment. The defaults are those of one process without a Trainer."""

    signals: StopSignals  # how it is asked to stop
    listeners: Sequence[Callable[[int, int, int], None]] = ()  # get (sequences still running, tokens decoded, max_new_tokens)
    rank: int = 0  # number of this process
    world_size: int = 1
    step: int = 0  # optimizer steps that were made
    steps_left: Callable[[], float] = lambda: math.inf  # optimizer steps that will still be made
    accumulate_grad_batches: int = 1  # micro-batches of an optimizer step, which can change between epochs
    device: torch.device | None = None  # that trains; None: where the model is
    is_training: bool = False  # whether all ranks are in the training loop, in which they complete equally often
    is_resumed: bool = False  # whether training continues from a checkpoint
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda values: values  # all ranks call it
    gather_over_ranks: Callable[[Any], list[Any]] = lambda value: [value]  # likewise
    restart_epoch: Callable[[], None] = lambda: None  # counts its micro-batches from 0, where a resume finds other data
