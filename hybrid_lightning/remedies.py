"""What the command line says of mistakes that libraries notice, or nobody does: the cause, and what to give instead."""

import errno
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hybrid_lightning.errors import ConfigError

# What Lightning says of the Trainer's flags -> what to give; its messages stand before it.
_REMEDIES = (
    (
        r"No supported gpu backend|can not run on your system|Requirement 'torch_xla",
        "no such device is found here: give --trainer.accelerator=cpu, or auto for the best that is there",
    ),
    (r"machine only has", "give --trainer.devices=auto for all that are there, or fewer"),
    (r"`devices` selected with|is not a valid input using \w+ accelerator", "give --trainer.devices=1, or auto"),
    (
        r"requires a GPU accelerator",
        "give --trainer.accelerator=gpu on a machine that has one; on CPUs configs/strategy/fsdp2.yaml and ddp.yaml work",
    ),
    (
        r"`enable_checkpointing=False` but found",
        "for no checkpoints give --checkpoint.save_last=false --checkpoint.save_top_k=0 instead",
    ),
)
# What no change of the code would mend: of a disk, whose errors name no file, and of a file or folder.
_FULL = {errno.ENOSPC, errno.EDQUOT}
_OF_THE_MACHINE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}
_NO_ROOM = re.compile(r"No space left on device|Disk quota exceeded")
_NOT_WRITABLE = re.compile(r"\[Errno \d+\] (?:Permission denied|Operation not permitted|Read-only file system)")
# Modules that train on different things: the config of one is none of another.
_KINDS = ("PolicyModule", "SupervisedModule", "PreferenceModule")
_WHOLE = {"model", "data", "trainer"}  # sections of a config that is complete by itself


def is_of_the_machine(error: BaseException) -> bool:
    """Whether a file or folder cannot be written or read here, as where a disk is full or a folder is read-only."""
    if not isinstance(error, OSError):
        return False
    return error.errno in _FULL or (error.errno in _OF_THE_MACHINE and error.filename is not None)


def with_remedy(message: str) -> str:
    """A message, and what to do about it where it does not say so itself.

    Args:
        message: Of an error, as its library words it.
    """
    for pattern, remedy in _REMEDIES:
        if re.search(pattern, message) and remedy not in message:
            return f"{message.strip().rstrip('.!')}; {remedy}"
    if message.startswith("[Errno"):
        if _NO_ROOM.search(message):
            return f"{message}; make room, or give another place by --trainer.logger.save_dir=FOLDER"
        if _NOT_WRITABLE.match(message):
            return f"{message}; give a place that can be written to, such as by --trainer.logger.save_dir=FOLDER"
    return message


def check_whole_configs(arguments: Sequence[str]) -> None:
    """Refuse configs of different kinds of training in one command: the last would win, and what the others say be dropped.

    Args:
        arguments: Of the command line.

    Raises:
        ConfigError: naming the two, and what to give.
    """
    first: tuple[str, str] | None = None
    for path in _configs(arguments):
        kind = _kind(path)
        if kind is None:
            continue
        if first is not None and kind != first[1]:
            raise ConfigError(
                f"--config {first[0]} trains a {first[1]} and --config {path} a {kind}: neither lies on top of the other; give "
                "one of the two, and what is to differ from it as options or in a config without model.class_path"
            )
        first = first or (path, kind)


def _configs(arguments: Sequence[str]) -> Iterable[str]:
    for number, word in enumerate(arguments):
        if word.startswith("--config="):
            yield word.removeprefix("--config=")
        elif word in ("--config", "-c"):
            yield from arguments[number + 1 : number + 2]


def _kind(path: str) -> str | None:
    """Which of our modules a config trains; None for an overlay, a module of one's own, or what cannot be read."""
    try:
        content: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # the parser says what is wrong with it
        return None
    model = content.get("model") if isinstance(content, Mapping) else None
    if isinstance(model, str):
        model = {"class_path": model}
    if not isinstance(model, Mapping):
        return None
    named = model.get("class_path", _KINDS[0] if content.keys() >= _WHOLE else None)
    name = str(named).rpartition(".")[2]
    return name if name in _KINDS else None
