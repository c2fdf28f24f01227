"""What a process says when another one of its run is gone.

`GracefulStop`: a signal, or a reward that fails, ends a run with what it can go on from bit for bit.
"""

import copy
import re
import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from hybrid_lightning.adapters.kept_scoring import SCORING
from hybrid_lightning.callbacks.display import resume_command, saved_config, say
from hybrid_lightning.callbacks.hybrid_adapter_setup import HybridAdapterSetup
from hybrid_lightning.callbacks.run_folder import find_run_folder, run_folder
from hybrid_lightning.errors import RewardError
from hybrid_lightning.rollout.loader import RolloutLoader
from hybrid_lightning.sharding.ranks import gather_counts
from hybrid_lightning.stopping import NOTHING_MADE, RunStopped, StopSignals

# What gloo, NCCL and torch's watchdog say.
_SIGNS = re.compile(r"connection (was )?(closed|reset|refused)|broken pipe|timed? ?out|NCCL|gloo|heartbeat", re.IGNORECASE)


def lost_contact(trainer: Trainer, exception: BaseException) -> str | None:
    """One line that names the cause and the checkpoint to go on from; None for errors that a process has by itself.

    Args:
        trainer: Of this process. Nothing is asked of the others.
        exception: What ended the run here.
    """
    if not isinstance(exception, RuntimeError) or not _SIGNS.search(str(exception)):
        return None
    # Not `last_model_path`, which Lightning sets before it writes: that file may be the one whose writing was cut short.
    checkpoint = getattr(trainer.checkpoint_callback, "_last_checkpoint_saved", "") or trainer.ckpt_path
    command = f"--ckpt_path {checkpoint}" if saved_config(trainer) is None else resume_command(trainer, str(checkpoint))
    remedy = f"go on with {command}" if checkpoint else "no checkpoint has been saved yet"
    return (
        f"rank {trainer.global_rank} lost contact with another rank, which was killed, has failed or hangs; its own output says "
        f"why; {remedy}"
    )


# In a checkpoint: step and epoch as which a validation is logged that was due and had not ended.
_VALIDATION_DUE = "validation_due"


class GracefulStop(Callback):
    """Ends a run on SIGINT, SIGTERM, SIGUSR1 or SIGHUP, and says how to go on; the process exits with 128 + the signal's number.

    Must stand before `HybridAdapterSetup`, so that a signal counts while modules are scored.

    A checkpoint `checkpoints/stopped.ckpt` is that of the last optimizer step that was finished. What has been begun since is
    given back: a rollout that is being generated is drawn again in the same way, gradients of an unfinished step are dropped and
    its micro-batches go back to the loader, and a validation is made by the run that goes on. So the curves of both runs
    lie on those of one that was not stopped. Before the first rollout there is no checkpoint, but what scoring has found
    (see `HybridAdapterSetup`). A rollout that the reward fails on, after at least one step of a single process, leaves a
    checkpoint as well.

    Several processes agree on where they stop: a signal to one of them is enough, and all save. A second signal ends a process
    where it is. A process that loses contact with another, which was killed or has failed, says what to do.

    Args:
        signals: Of this process, where they have been taken over already; None takes them over while the Trainer runs.
    """

    def __init__(self, signals: StopSignals | None = None) -> None:
        self.signals = signals or StopSignals()
        self._mine = False  # whether they were taken over here, and are to be given back
        self._training = False
        self._deferred: Any = None
        self._taken = 0  # micro-batches of the optimizer step that is not finished
        self._progress: dict[str, Any] | None = None  # of Lightning's loops, when the last step was finished
        self._due: dict[str, int] | None = None  # step and epoch as which a validation is logged that is due after that step
        self._begun = False  # whether this run has taken a micro-batch
        self._rolled_back = False

    # ---- signals

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take over the signals, and hand them to a module that knows better where it can be stopped."""
        if stage == "fit":
            self._training, self._begun, self._rolled_back = False, False, False
            self._taken, self._progress, self._due = 0, None, None
        self._mine = self._mine or not self.signals.taken_over
        self.signals.take_over()
        self.signals.started_ranks = [process.pid for process in getattr(trainer.strategy.launcher, "procs", [])]
        self.signals.last_words = lambda: _go_on_from(trainer)
        if hasattr(pl_module, "signals"):
            pl_module.signals = self.signals  # type: ignore[assignment]

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on ranks stop together. Lightning has taken SIGTERM meanwhile, to broadcast amid other messages."""
        self._defer()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, with the validation that the run before owed."""
        self._defer()
        self._training = True
        trainer.fit_loop._load_combined_loader_states()  # a checkpoint may be saved before Lightning does
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, HybridAdapterSetup):  # what it changes in the loops' progress is part of it
                callback.on_train_start(trainer, pl_module)
        loaded, self._progress = self._progress, _progress(trainer)
        if loaded is not None:
            self._progress["epoch_progress"] = loaded["epoch_progress"]  # which Lightning has gone on with meanwhile
        if loaded is not None and trainer.fit_loop.epoch_loop.batch_progress.total.ready == 0:
            # No batch has been trained on, so that there is nothing to go on with: Lightning would go on after a validation.
            trainer.fit_loop.epoch_loop.restarting = False
        if self._due is not None and trainer.enable_validation:
            self._validate(trainer, self._due)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take SIGTERM back from Lightning."""
        self.signals.take_over()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take SIGTERM back from Lightning."""
        self.signals.take_over()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take SIGTERM back from Lightning."""
        self.signals.take_over()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A signal that came with the last step leaves a checkpoint, since there may be no other of that step."""
        self._check(trainer)
        self._training = False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A signal that came while the run was summed up counts as well."""
        self.signals.check()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._release(trainer)

    def _defer(self) -> None:
        self.signals.take_over()
        if self._deferred is None:
            self._deferred = self.signals.deferred()
            self._deferred.__enter__()

    def _release(self, trainer: Trainer) -> None:
        if self._deferred is not None:
            self._deferred.__exit__(None, None, None)
            self._deferred = None
        if self._mine:
            trainer._signal_connector.teardown()  # it would put back later what it found, which are the handlers of this run
            self.signals.give_back()
            self._mine = False

    def _check(self, trainer: Trainer) -> None:
        """Stop if one of the ranks has been asked to; all of them call it."""
        number = max(gather_counts(self.signals.requested, trainer.strategy.root_device))
        if number:
            raise RunStopped(number, together=True)

    # ---- where the run is

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the micro-batches of the step."""
        self._taken, self._begun = self._taken + 1, True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note where the run is once a step is finished; stop for modules that do not know of signals themselves."""
        loop = trainer.fit_loop.epoch_loop
        if loop._should_accumulate():
            return
        self._taken, self._progress = 0, _progress(trainer)
        due = trainer.enable_validation and loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
        self._due = _place(trainer) if due else None
        if not hasattr(pl_module, "signals"):
            self._check(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What was due has been done."""
        if not trainer.sanity_checking:
            self._due = None

    @property
    def validation_due(self) -> bool:
        """Whether a validation after the last step has not been made."""
        return self._due is not None

    def _validate(self, trainer: Trainer, due: dict[str, int]) -> None:
        """Make the validation that the run before had begun or was about to begin, logged as it would have been by that run."""
        loop, epochs, before = trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_progress.current, _place(trainer)
        loop._batches_that_stepped, epochs.completed = due["step"], due["epoch"]
        trainer.validating = True
        loop.val_loop.restarting = False
        loop.val_loop.run()
        trainer.training = True
        loop._batches_that_stepped, epochs.completed = before["step"], before["epoch"]

    # ---- saving and loading

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say where the run was when the last step was finished, if something has been begun since."""
        begun_since = self._rolled_back or not self._begun or self._due is not None
        if self._training and self._progress is not None and begun_since:
            checkpoint["loops"]["fit_loop"].update(copy.deepcopy(self._progress))
        if self._due is not None:
            checkpoint[_VALIDATION_DUE] = self._due

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stopped before its first step, a resumed run leaves what it was given."""
        if trainer.state.fn == "fit":
            loops = checkpoint["loops"]["fit_loop"]
            self._progress = copy.deepcopy({name: value for name, value in loops.items() if name != "state_dict"})
            self._due = checkpoint.get(_VALIDATION_DUE)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the checkpoint if a signal or a reward stopped the run, and say what there is to go on from."""
        if trainer.world_size > 1 and (message := lost_contact(trainer, exception)) is not None:
            sys.stderr.write(message + "\n")
            exception.add_note(message)  # the last line of its traceback, too, above which the other would be lost
        stopped = isinstance(exception, RunStopped)
        if (self._training and stopped) or _reward_failed(trainer, exception):
            self._save(trainer, pl_module)
        elif stopped and trainer.is_global_zero:
            holder = find_run_folder(trainer)
            if holder is not None and holder.path is not None and (holder.path / SCORING).is_dir():
                holder.keep()
            say(f"Stopped: {_go_on_from(trainer)}")
        if isinstance(exception, RunStopped):
            exception.explained = True
        self._release(trainer)

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = run_folder(trainer)
        if folder is None:
            say("Stopped: fast_dev_run leaves nothing to go on from.")
            return
        if trainer.validating:
            # The one after the last step is due at no interval.
            self._due = self._due or _place(trainer)
            trainer.training = True
        self._rolled_back = True
        for optimizer in trainer.optimizers:
            optimizer.zero_grad()
        for loader in trainer.fit_loop._combined_loader.flattened if trainer.fit_loop._combined_loader else ():
            if isinstance(loader, RolloutLoader):
                loader.give_back(self._taken)
        path = folder / "checkpoints" / "stopped.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            say(f"Checkpoint saved. Go on with:\n  {resume_command(trainer, path)}")


def _place(trainer: Trainer) -> dict[str, int]:
    """As which step and epoch Lightning logs."""
    return {"step": trainer.fit_loop.epoch_loop._batches_that_stepped, "epoch": trainer.current_epoch}


def _progress(trainer: Trainer) -> dict[str, Any]:
    """Progress of Lightning's loops, without the state of the loader."""
    loop = trainer.fit_loop
    return copy.deepcopy({**loop.epoch_loop.state_dict(prefix="epoch_loop."), "epoch_progress": loop.epoch_progress.state_dict()})


def _go_on_from(trainer: Trainer) -> str:
    """What there is to go on from, of which nothing is asked from other ranks."""
    checkpoint = getattr(trainer.checkpoint_callback, "_last_checkpoint_saved", "") or trainer.ckpt_path
    if trainer.state.fn != "fit":
        return "start the command again"
    if checkpoint:
        return f"go on with:\n  {resume_command(trainer, checkpoint)}"
    holder = find_run_folder(trainer)  # which is not asked to make one now
    folder = None if holder is None else holder.path
    if folder is not None and (folder / SCORING).is_dir():
        return f"nothing has been trained yet; go on from what scoring has found:\n  {resume_command(trainer, folder / SCORING)}"
    return NOTHING_MADE


def _reward_failed(trainer: Trainer, exception: BaseException) -> bool:
    """Whether it did in training, after at least one step, and in the only process."""
    return isinstance(exception, RewardError) and trainer.training and trainer.global_step > 0 and trainer.world_size == 1
