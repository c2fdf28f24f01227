"""Adds remedies to error messages of other libraries, and rejects configs with a mistake that nothing else would detect.

`cli_parser.py` reports mistakes in arguments; this file covers messages of Lightning and of the operating system.
"""

import errno
import re
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hybrid_lightning.errors import ConfigError, one_line

# Pattern in a message about the Trainer's flags, a disk or a file -> remedy, which is appended to the message.
_REMEDIES = (
    (
        r"No supported gpu backend|can not run on your system|Requirement 'torch_xla",
        "no such device is found here: give --trainer.accelerator=cpu, or auto for the best that is there",
    ),
    (r"selected an invalid strategy name", "give --trainer.strategy=auto, ddp or fsdp"),
    (r"machine only has", "give --trainer.devices=auto for all that are there, or fewer"),
    (r"`devices` selected with|is not a valid input using \w+ accelerator", "give --trainer.devices=1, or auto"),
    (
        r"`enable_checkpointing=False` but found",
        "for no checkpoints give --checkpoint.save_last=false --checkpoint.save_top_k=0 instead",
    ),
    (
        r"^\[Errno.*(?:No space left on device|Disk quota exceeded)",
        "make room, or give another place by --trainer.logger.save_dir=FOLDER",
    ),
    (
        r"^\[Errno \d+\] (?:Permission denied|Operation not permitted|Read-only file system)",
        "give a place that can be written to, such as by --trainer.logger.save_dir=FOLDER",
    ),
)
# Names in TRL's GRPOConfig and PEFT's LoraConfig that differ from ours -> our option.
TRL_NAMES = {
    "num_generations": "model.samples_per_prompt",
    "num_iterations": "model.epochs_per_rollout",
    "max_completion_length": "model.sampler.max_new_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "generation_batch_size": "model.prompts_per_rollout",
    "per_device_train_batch_size": "model.prompts_per_rollout",
    "steps_per_generation": "model.minibatches_per_rollout",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "train_dataset": "data.source",
    "reward_funcs": "model.reward",
    "loss_type": "model.loss",
    "scale_rewards": "model.advantage",
    "beta": "model.loss.kl_coef",
    "epsilon": "model.loss.clip_low",
    "epsilon_high": "model.loss.clip_high",
    "learning_rate": "model.lr_lora",
    "lr_scheduler_type": "model.schedule",
    "max_grad_norm": "trainer.gradient_clip_val",
    "num_train_epochs": "trainer.max_epochs",
    "bf16": "trainer.precision",
    "use_vllm": "model.sampler",
    "output_dir": "trainer.logger",
    "peft_config": "adapter.rank",
    "lora_r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
}
# Errors of the machine, not of the code: of a full disk, which may name no file, and of a file or folder that cannot be used.
_FULL = {errno.ENOSPC, errno.EDQUOT}
_OF_THE_MACHINE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}
# Our modules for different kinds of training: a config is for only one of them.
_KINDS = ("PolicyModule", "SupervisedModule", "PreferenceModule")
_WHOLE = {"model", "data", "trainer"}  # a config with these sections is complete by itself


def with_remedy(message: str) -> str:
    """Append a remedy to a library's error message, unless the message has one."""
    for pattern, remedy in _REMEDIES:
        if re.search(pattern, message) and remedy not in message:
            return f"{message.strip().rstrip('.!')}; {remedy}"
    return message


def of_trl(name: str) -> str:
    """Our name for a TRL option, and where to find the others; empty if it is not a TRL option."""
    return f"; TRL's {name} is --{TRL_NAMES[name]} here (docs/trl.md)" if name in TRL_NAMES else ""


def is_machine_error(error: BaseException) -> bool:
    """Whether an error means that a file or folder cannot be written or read: a full disk, a read-only folder, no access."""
    if not isinstance(error, OSError):
        return False
    return error.errno in _FULL or (error.errno in _OF_THE_MACHINE and error.filename is not None)


def check_whole_configs(arguments: Sequence[str]) -> None:
    """Reject configs for different kinds of training in one command: the last one would silently replace the others.

    Raises:
        ConfigError: If there are two such configs.
    """
    first = None
    for path in config_paths(arguments):
        kind = _kind(path)
        first = first or (kind and (path, kind))
        if first and kind and kind != first[1]:
            raise ConfigError(
                f"--config {first[0]} trains a {first[1]}, but --config {path} trains a {kind}; give one of the two, and put "
                "changes to it into options or into a config without model.class_path"
            )


def config_paths(arguments: Sequence[str]) -> list[str]:
    """Paths of the configs among command-line arguments."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config", action="append", default=[], nargs="?")
    return [path for path in parser.parse_known_args(arguments)[0].config if path]


def broken_config(arguments: Sequence[str]) -> str:
    """The first config among a command's arguments that is not YAML, and the place of the mistake; empty if there is none."""
    for path in config_paths(arguments):
        try:
            yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:  # a MarkedYAMLError, or a ReaderError of a character that YAML refuses
            problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
            place = "" if mark is None else f" in line {mark.line + 1}"
            before = "" if mark is None else mark.buffer[: mark.pointer].rpartition("\n")[2]  # on the line of the mistake
            in_text = str(problem).startswith("mapping values") or ": " in before  # as in `rubric: One of: a, b`
            remedy = "put a text that contains ': ' in quotes, or correct the line" if in_text else "correct it"
            return f"--config {path} is not valid YAML: {problem or one_line(error)}{place}; {remedy}"
        except (OSError, ValueError):  # unreadable, or not UTF-8
            continue
    return ""


def _kind(path: str) -> str | None:
    """The name of our module that a config trains; None for an overlay, a user's own module, or an unreadable file."""
    try:
        content: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # the parser will report the error
        return None
    model = content.get("model") if isinstance(content, Mapping) else None
    if isinstance(model, str):
        model = {"class_path": model}
    if not isinstance(model, Mapping):
        return None
    named = model.get("class_path", _KINDS[0] if content.keys() >= _WHOLE else None)
    name = str(named).rpartition(".")[2]
    return name if name in _KINDS else None
