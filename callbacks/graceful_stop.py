"""`GracefulStop`: Ctrl-C, SIGTERM and a reward that fails end a run with a checkpoint from which it goes on bit for bit."""

import signal
import sys
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from hybrid_lightning.callbacks.display import console, resume_command, run_folder
from hybrid_lightning.callbacks.lost_contact import lost_contact
from hybrid_lightning.errors import RewardError


class GracefulStop(Callback):
    """Saves `checkpoints/stopped.ckpt` at the next optimizer step, or at once during a generation, and ends the run.

    A checkpoint is whole only between optimizer steps: gradients that are being accumulated are in none. A rollout that is being
    generated is abandoned, and its random numbers given back, so that it is drawn again in the same way; so is one that the
    reward failed on, and the run goes on once that is mended. A second signal stops at once, without a checkpoint. Under several
    processes Lightning's own handling of signals stays in force, a failed reward leaves no checkpoint, and a process that loses
    contact with another, which was killed or has failed, says what to do.
    """

    def __init__(self) -> None:
        self._requested: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._trainer: Trainer | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals while training runs."""
        if trainer.world_size > 1:
            return
        self._trainer, self._requested = trainer, None
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not the main thread, which alone may handle signals
                return
        getattr(pl_module, "generation_listeners", []).append(self._during_generation)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop if asked to, once the accumulated gradients have been applied."""
        if self._requested is not None and not trainer.fit_loop._should_accumulate():
            raise _RunStopped

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back."""
        self._release(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the checkpoint if this callback or a reward stopped the run, and give the signals back."""
        if trainer.world_size > 1 and (message := lost_contact(trainer, exception)) is not None:
            sys.stderr.write(message + "\n")
            exception.add_note(message)  # the last line of its traceback, too, above which the other would be lost
        # Asked only then: the processes of a run tell each other its folder, and where one fails the others do not listen.
        folder = run_folder(trainer) if isinstance(exception, _RunStopped) or _reward_failed(trainer, exception) else None
        if folder is not None:
            path = folder / "checkpoints" / "stopped.ckpt"
            trainer.save_checkpoint(path)
            console().print(f"Checkpoint saved. Go on with:\n  {resume_command(trainer, path)}", soft_wrap=True)
        self._release(pl_module)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._requested is not None:
            raise KeyboardInterrupt
        self._requested = signal.Signals(number)
        console().print(
            f"\n{self._requested.name}: stopping with a checkpoint after this optimizer step; once more stops at once."
        )

    def _during_generation(self, running: int, decoded: int, total: int) -> None:
        # Not in a validation, of which a checkpoint would hold a half.
        if self._requested is not None and self._trainer is not None and self._trainer.training:
            raise _RunStopped

    def _release(self, pl_module: LightningModule) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        listeners = getattr(pl_module, "generation_listeners", [])
        if self._during_generation in listeners:
            listeners.remove(self._during_generation)


class _RunStopped(KeyboardInterrupt):
    """Unwinds to Lightning, which ends the run as for any Ctrl-C and tells the callbacks."""


def _reward_failed(trainer: Trainer, exception: BaseException) -> bool:
    """Whether it did in training, after at least one step, and in the only process."""
    return isinstance(exception, RewardError) and trainer.training and trainer.global_step > 0 and trainer.world_size == 1
