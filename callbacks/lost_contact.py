"""What a process says when another one of its run is gone."""

import re

from lightning.pytorch import Trainer

from hybrid_lightning.callbacks.display import resume_command, saved_config

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
