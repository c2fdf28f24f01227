"""`GracefulStop`: ends a run after a signal or a failed reward so that it can be resumed bit for bit."""

import copy
import os
import platform
import re
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from hybrid_lightning.callbacks.display import resume_command, saved_config, say
from hybrid_lightning.callbacks.run_folder import find_callback, run_folder
from hybrid_lightning.errors import RewardError, RolloutError
from hybrid_lightning.rollout.loader import RolloutLoader
from hybrid_lightning.sharding.ranks import check_stop, gather_objects
from hybrid_lightning.shared.stopping import NOTHING_MADE, RunStopped, StopSignals
from hybrid_lightning.training.lightning_internals import (
    ends_step,
    log_under,
    logged_step,
    restore_signal_handlers,
    validation_follows,
)
from hybrid_lightning.training.module import LanguageModule

# Messages of gloo, NCCL and torch's watchdog about a lost connection.
_SIGNS = re.compile(r"connection (was )?(closed|reset|refused)|broken pipe|timed? ?out|NCCL|gloo|heartbeat", re.IGNORECASE)
# Checkpoint key for a validation that was due and had not ended: the step and epoch under which to log it.
_VALIDATION_DUE = "validation_due"


class GracefulStop(Callback):
    """Ends a run on SIGINT, SIGTERM, SIGUSR1 or SIGHUP, and prints how to resume. The exit code is 128 + the signal's number.

    It must come before `HybridAdapterSetup`, so that signals are handled while modules are scored.

    The checkpoint `checkpoints/stopped.ckpt` is the state after the last finished optimizer step. Anything begun after that step
    is undone: a rollout in progress will be drawn again in the same way, the gradients of an unfinished step are dropped and its
    micro-batches go back to the loader, and the resumed run makes a pending validation. So the curves of both runs together equal
    the curves of a run that was not stopped. Before the first rollout there is no checkpoint: a run that is stopped while it
    scores the modules starts over. If a rollout engine fails, a checkpoint is saved as well. If a reward fails, one is saved
    after at least one step of a run with one process.

    Several processes agree on where they stop: a signal to any of them is enough, and all save together. A second signal ends a
    process at once. A process that loses contact with another one prints which one died, if that is known, and what to do.
    Args:
        signals: This process's signal handlers if they are already installed; None installs them while the Trainer runs.
    """

    def __init__(self, signals: StopSignals | None = None) -> None:
        self.signals = signals or StopSignals()
        self._mine = False  # whether this callback installed the signal handlers and must remove them
        self._training = False
        self._deferred = ExitStack()  # contexts in which signals wait
        self._taken = 0  # number of micro-batches taken in the unfinished optimizer step
        self._progress: dict[str, Any] | None = None  # progress of Lightning's loops after the last finished step
        self._due: dict[str, int] | None = None  # step and epoch under which to log a validation that is due after that step
        self._begun = False  # whether this run has taken a micro-batch
        self._rolled_back = False  # whether an unfinished step has been undone
        self._processes: list[tuple[str, int]] = []  # machine and process id of each rank

    # ---- signals

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Handle the signals; a module with an attribute `signals` gets them, so that it decides where it can be stopped."""
        if stage == "fit":
            self._training, self._begun, self._rolled_back = False, False, False
            self._taken, self._progress, self._due = 0, None, None
        self._mine = self._mine or not self.signals.taken_over
        self.signals.take_over()
        started = [process.pid for process in getattr(trainer.strategy.launcher, "procs", [])]
        self.signals.inform(started, lambda: _how_to_resume(trainer))
        self._processes = gather_objects((platform.node(), os.getpid()))
        if isinstance(pl_module, LanguageModule):
            pl_module.run.signals = self.signals

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on ranks stop together. Lightning has installed its own handler of SIGTERM, which broadcasts at any time."""
        self._defer()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin training, after a pending validation of the stopped run."""
        self._defer()
        self._training = True
        loaded, self._progress = self._progress, _progress(trainer)
        if loaded is not None:
            self._progress["epoch_progress"] = loaded["epoch_progress"]  # Lightning has already advanced its own
            if trainer.fit_loop.epoch_loop.batch_progress.total.ready == 0:
                trainer.fit_loop.epoch_loop.restarting = False  # without this it would continue as if after a validation
        if self._due is not None and trainer.enable_validation:
            self._validate(trainer, self._due)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take SIGTERM back from Lightning."""
        self.signals.take_over()

    on_test_start = on_predict_start = on_validation_start

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop with a checkpoint if a signal came with the last step, since there may be no other checkpoint of that step."""
        check_stop(self.signals, trainer.strategy.root_device)
        self._training = False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop if a signal came during the run summary."""
        self.signals.check()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the previous signal handlers."""
        self._deferred.close()
        if self._mine:
            restore_signal_handlers(trainer)  # now: later it would restore this run's handlers
            self.signals.give_back()
            self._mine = False

    def _defer(self) -> None:
        self.signals.take_over()
        self._deferred.enter_context(self.signals.deferred())

    # ---- progress

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the micro-batches of the step."""
        self._taken, self._begun = self._taken + 1, True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Record the progress after a finished step, and stop for modules that do not handle signals themselves."""
        if not ends_step(trainer):
            return
        self._taken, self._progress = 0, _progress(trainer)
        self._due = _place(trainer) if validation_follows(trainer) else None
        if not isinstance(pl_module, LanguageModule):
            check_stop(self.signals, trainer.strategy.root_device)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record that no validation is pending any more."""
        if not trainer.sanity_checking:
            self._due = None

    @property
    def validation_due(self) -> bool:
        """Whether a validation after the last step has not been made yet."""
        return self._due is not None

    def _validate(self, trainer: Trainer, due: dict[str, int]) -> None:
        """Make the validation that the stopped run had begun or was about to begin, logged under that run's step."""
        loop, epochs, before = trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_progress.current, _place(trainer)
        log_under(trainer, due["step"])
        epochs.completed = due["epoch"]
        trainer.validating, loop.val_loop.restarting = True, False
        loop.val_loop.run()
        trainer.training = True
        log_under(trainer, before["step"])
        epochs.completed = before["epoch"]

    # ---- saving and loading

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the progress after the last finished step if anything has begun since then."""
        begun_since = self._rolled_back or not self._begun or self._due is not None
        if self._training and self._progress is not None and begun_since:
            checkpoint["loops"]["fit_loop"].update(copy.deepcopy(self._progress))
        if self._due is not None:
            checkpoint[_VALIDATION_DUE] = self._due

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take over the progress from the checkpoint, in case the resumed run is stopped before its first step."""
        if trainer.state.fn == "fit":
            loops = checkpoint["loops"]["fit_loop"]
            self._progress = copy.deepcopy({name: value for name, value in loops.items() if name != "state_dict"})
            self._due = checkpoint.get(_VALIDATION_DUE)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save a checkpoint if a signal or a failed reward stopped the run, and print how to resume."""
        if trainer.world_size > 1 and (message := lost_contact(trainer, exception)) is not None:
            sys.stderr.write(message + "\n")
            exception.add_note(message)  # Python prints it last; the line written here may be lost above the traceback
            exception.explained = True  # type: ignore[attr-defined]  # so that the command line prints no traceback
        saves = self._training and isinstance(exception, (RunStopped, RolloutError))  # all ranks raise these together
        if isinstance(exception, RewardError) and trainer.training:
            saves = trainer.global_step > 0 and trainer.world_size == 1
        if saves:
            self._save(trainer, exception)
        elif isinstance(exception, RunStopped) and trainer.is_global_zero:
            say(f"Stopped: {_how_to_resume(trainer)}")
        if isinstance(exception, RunStopped):
            exception.explained = True
        self.teardown(trainer, pl_module, "fit")

    def gone_ranks(self) -> list[int]:
        """Ranks on this machine with ended processes; a connection breaks a moment before its process is gone."""
        here = {rank: process for rank, (machine, process) in enumerate(self._processes) if machine == platform.node()}
        for _ in range(10):
            if gone := [rank for rank, process in here.items() if not _lives(process)]:
                return gone
            time.sleep(0.1)
        return []

    def _save(self, trainer: Trainer, exception: BaseException) -> None:
        folder = run_folder(trainer)
        if folder is None:  # fast_dev_run and `doctor` keep nothing
            if isinstance(exception, RunStopped) and trainer.is_global_zero:
                say("Stopped: start the command again")
            return
        if trainer.validating:
            # For a validation after the last step, which is not due by an interval.
            self._due = self._due or _place(trainer)
            trainer.training = True
        self._rolled_back = True
        for optimizer in trainer.optimizers:
            optimizer.zero_grad()
        if isinstance(trainer.train_dataloader, RolloutLoader):
            trainer.train_dataloader.give_back(self._taken)
        path = folder / "checkpoints" / "stopped.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            words = f"Checkpoint saved. Resume with:\n  {resume_command(trainer, path)}"
            if isinstance(exception, RunStopped):
                say(words)
            else:
                exception.add_note(words)  # the cause comes first


def lost_contact(trainer: Trainer, exception: BaseException) -> str | None:
    """One-line error message for a lost process of the run, with the checkpoint to resume from.

    None if another cause ended the run in this process. This does not communicate with other ranks.
    """
    if not isinstance(exception, RuntimeError) or not _SIGNS.search(str(exception)):
        return None
    checkpoint, stop = last_checkpoint(trainer), find_callback(trainer, GracefulStop)
    command = f"--ckpt_path {checkpoint}" if saved_config(trainer) is None else resume_command(trainer, str(checkpoint))
    remedy = f"resume with {command}" if checkpoint else "no checkpoint has been saved yet"
    gone = [] if stop is None else stop.gone_ranks()
    cause = " and ".join(f"rank {rank} died" for rank in gone) or "another rank was killed, has failed or hangs"
    return f"rank {trainer.global_rank} lost contact: {cause}; its own output shows why; {remedy}"


def _lives(process: int) -> bool:
    """Whether a process of this machine runs; a zombie (its parent has not read its exit code) does not."""
    with suppress(OSError):
        if sys.platform == "linux":
            return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
        os.kill(process, 0)
        return True
    return False


def _place(trainer: Trainer) -> dict[str, int]:
    """The step and epoch under which Lightning logs."""
    return {"step": logged_step(trainer), "epoch": trainer.current_epoch}


def _progress(trainer: Trainer) -> dict[str, Any]:
    """Progress of Lightning's loops, without the state of the loader."""
    loop = trainer.fit_loop
    return copy.deepcopy({**loop.epoch_loop.state_dict(prefix="epoch_loop."), "epoch_progress": loop.epoch_progress.state_dict()})


def _how_to_resume(trainer: Trainer) -> str:
    """How to resume this run, in words; this does not communicate with other ranks."""
    if trainer.state.fn != "fit":
        return "start the command again"
    if checkpoint := last_checkpoint(trainer):
        return f"resume with:\n  {resume_command(trainer, checkpoint)}"
    return f"{NOTHING_MADE} (scoring starts over)"


def last_checkpoint(trainer: Trainer) -> str | Path | None:
    """The checkpoint to resume from; falsy if there is none."""
    # Not `last_model_path`: Lightning sets it before it writes the file, and that write may have been interrupted.
    return getattr(trainer.checkpoint_callback, "_last_checkpoint_saved", "") or trainer.ckpt_path
