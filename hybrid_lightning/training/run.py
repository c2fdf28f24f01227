"""`Run`: the interface between training and its run: steps, ranks, stops and logging.

Without a Trainer, a policy has the plain `Run` of this file: one process, and no steps yet. Under Lightning, modules have a
`LightningRun`, which reads from the Trainer.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from hybrid_lightning.errors import RewardError, RolloutError
from hybrid_lightning.sharding.ranks import check_stop, gather_objects, sum_over_ranks
from hybrid_lightning.shared.stopping import RunStopped, StopSignals
from hybrid_lightning.training.step_times import PhaseClock


class Run:
    """A policy's run; here one process without any optimizer steps.

    Attributes:
        signals: Signals that stop the run.
        listeners: Called while completions are made, with (sequences still running, tokens decoded, `max_new_tokens`).
        clock: Times of the phases; `StepTimer` replaces it.
    """

    stage: str = ""  # `fit`, `validate`, `test` or `predict`; empty without a Trainer
    rank: int = 0  # number of this process
    world_size: int = 1  # number of processes
    device: torch.device | None = None  # the device that trains; None: the model's device
    step: int = 0  # finished optimizer steps
    steps_left: float = math.inf  # optimizer steps that the run will still make
    accumulate_grad_batches: int = 1  # micro-batches per optimizer step, which can change between epochs
    is_training: bool = False  # whether all ranks are in the training loop, where they complete prompts equally often
    is_resumed: bool = False  # whether training continues from a checkpoint
    scales_loss: bool = False  # whether a step with infinite gradients is skipped, as under `16-mixed`
    restarts_epochs: str = ""  # why an epoch may restart in the middle of rollouts, in words; empty if it cannot
    ends_by_clock: bool = False  # whether training has a time limit

    def __init__(self) -> None:
        self.signals = StopSignals()
        self.listeners: list[Callable[[int, int, int], None]] = []
        self.clock = PhaseClock()
        self._warned: set[str] = set()

    def warn_once(self, text: str, what: str) -> None:
        """Warn once per run for each `what`."""
        if what not in self._warned:
            self._warned.add(what)
            rank_zero_warn(text)

    # ---- ranks and stops

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum over ranks. All ranks must call this."""
        return sum_over_ranks(values)

    def gather_over_ranks(self, value: Any) -> list[Any]:
        """The values of all ranks. All ranks must call this."""
        return gather_objects(value)

    def check_stop(self) -> None:
        """Raise `RunStopped` on all ranks if one of them has received a stop signal. All ranks must call this."""
        check_stop(self.signals, self.device or torch.device("cpu"))

    def interruptible(self) -> AbstractContextManager[Any]:
        """Context in which a signal raises immediately, for code that changes no state and that no other rank waits for."""
        return self.signals.interruptible()

    @contextmanager
    def stopping_together(self) -> Iterator[None]:
        """Context for all ranks: a stop or failure of one rank ends all ranks at the end of the context."""
        failure: RolloutError | RewardError | None = None
        try:
            yield
        except RunStopped:
            pass  # raised only on this rank; `check_stop` ends the others
        except (RolloutError, RewardError) as error:
            failure = error
        self.check_stop()
        self.fail_together(failure)

    def fail_together(self, failure: Exception | None) -> None:
        """Raise a failure of one rank on all ranks (`failure` is None on the others). All ranks must call this."""
        first = next(filter(None, gather_objects(None if failure is None else str(failure))), None)
        if first is not None and self.world_size > 1 and not isinstance(failure, RolloutError):
            raise RolloutError(first) from failure
        if failure is not None:
            raise failure

    # ---- the optimizer step

    def restart_epoch(self) -> None:
        """Count the micro-batches of the epoch from 0. Called if a resumed run has different training prompts."""

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of a chunk of a micro-batch."""
        loss.backward()

    def clear_gradients(self) -> None:
        """Clear the gradients of the optimizer."""

    def log(self, values: Mapping[str, Any], shown: Sequence[str] = (), rows: int = 1) -> None:
        """Log metrics of an optimizer step over `rows` rows; the `shown` ones also beside the progress bar."""

    def log_evaluation(self, values: Mapping[str, float]) -> None:
        """Log metrics of an evaluation, which are the same on all ranks."""

    def forget(self, names: Sequence[str]) -> None:
        """Remove metrics of an earlier step, which would be logged again if this step does not have them."""
