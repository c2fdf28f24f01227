"""Hides advice that libraries print. Takes effect when a model is loaded or a Trainer is made, not at import."""

import logging
import os
import re
import warnings

import huggingface_hub
import transformers

# Lightning's loggers, and the lines to hide: advice, lists of devices, and repetitions of the command or the summary.
_LIGHTNING_LOGS = (
    "lightning.fabric.utilities.distributed",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
    "lightning.pytorch.accelerators.cuda",
    "lightning.pytorch.utilities.rank_zero",
)
_SAYS_NOTHING = re.compile(
    r"(\[rank: \d+\] )?Seed set to|GPU available: False|TPU available|LOCAL_RANK: \d+ - CUDA_VISIBLE_DEVICES"
    r"|Initializing distributed:"
    r"|Using \S+ Automatic Mixed Precision|Restoring states from the checkpoint|`Trainer.fit` stopped: `max_(steps|epochs)="
    r"|.*litlogger|.*\bTip:",
    re.DOTALL,
)


# Warnings that do not apply to a run.
_NOT_MEANT = (
    "overridden `transfer_batch_to_device`",  # LightningModule and data module share this hook by design
    "LeafSpec.*is deprecated",
    "dirpath has changed from",  # every run has its own folder: a resumed run reads a checkpoint from another folder
    "callbacks used to create the checkpoint need to be provided",  # their options changed, which the resume reports itself
    "does not have many workers",  # the loaders hold prompts or make rollouts, so worker processes would not help
    "Using `DistributedSampler` with the dataloaders",  # prompts that the sampler gives to two ranks are counted once
    "keys did not match any targeted module and were ignored",  # PEFT's warning for ranks of parameters, which it does apply
    "module.s. in eval mode at the start of training",  # the policy is loaded in eval mode; the adapter decides what to train
)


def quiet_libraries() -> None:
    """Hide library advice that does not apply to a run: tips, deprecations between libraries, progress bars for loading weights.

    The command line calls this, and so do loading a language model and making our Trainer. Importing changes nothing.
    """
    transformers.utils.logging.disable_progress_bar()
    if not huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS:
        huggingface_hub.utils.enable_progress_bars()  # download bars, which the line above has also switched off
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # there would be one bar per page of samples
    # Deprecations between libraries, which their next versions will resolve.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|torch.nn.modules.module|peft")
    for message in _NOT_MEANT:
        warnings.filterwarnings("ignore", message=f".*{message}.*")
    # Advice about 4-bit kernels, which bitsandbytes logs when PEFT imports it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    for name in _LIGHTNING_LOGS:
        logging.getLogger(name).addFilter(_informs)


def _informs(record: logging.LogRecord) -> bool:
    return _SAYS_NOTHING.match(record.getMessage()) is None
