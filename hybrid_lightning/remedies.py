"""Remedies: add what to do to error messages of other libraries, and refuse configs whose mistake nothing else would notice.

`cli_parser.py` words mistakes in arguments; this file is about messages of Lightning and of the operating system.
"""

import errno
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hybrid_lightning.errors import ConfigError

# Pattern in Lightning's messages about the Trainer's flags -> what to do, which is put behind the message.
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
# Errors that no change of the code would fix: of a disk, which name no file, and of a file or folder.
_FULL = {errno.ENOSPC, errno.EDQUOT}
_OF_THE_MACHINE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}
_NO_ROOM = re.compile(r"No space left on device|Disk quota exceeded")
_NOT_WRITABLE = re.compile(r"\[Errno \d+\] (?:Permission denied|Operation not permitted|Read-only file system)")
# Modules for different kinds of training: a config is for one of them only.
_KINDS = ("PolicyModule", "SupervisedModule", "PreferenceModule")
_WHOLE = {"model", "data", "trainer"}  # a config with these sections is complete by itself


def with_remedy(message: str) -> str:
    """Add to an error message, as its library words it, what to do, if it does not say so itself."""
    for pattern, remedy in _REMEDIES:
        if re.search(pattern, message) and remedy not in message:
            return f"{message.strip().rstrip('.!')}; {remedy}"
    if message.startswith("[Errno"):
        if _NO_ROOM.search(message):
            return f"{message}; make room, or give another place by --trainer.logger.save_dir=FOLDER"
        if _NOT_WRITABLE.match(message):
            return f"{message}; give a place that can be written to, such as by --trainer.logger.save_dir=FOLDER"
    return message


def is_machine_error(error: BaseException) -> bool:
    """Whether an error is about a file or folder that cannot be written or read, because a disk is full or a folder read-only."""
    if not isinstance(error, OSError):
        return False
    return error.errno in _FULL or (error.errno in _OF_THE_MACHINE and error.filename is not None)


def check_whole_configs(arguments: Sequence[str]) -> None:
    """Refuse configs for different kinds of training in one command: the last one would silently replace the others.

    Raises:
        ConfigError: If there are two such configs.
    """
    first: tuple[str, str] | None = None
    for path in config_paths(arguments):
        kind = _kind(path)
        if kind is None:
            continue
        if first is not None and kind != first[1]:
            raise ConfigError(
                f"--config {first[0]} trains a {first[1]} and --config {path} a {kind}: neither lies on top of the other; give "
                "one of the two, and what is to differ from it as options or in a config without model.class_path"
            )
        first = first or (path, kind)


def config_paths(arguments: Sequence[str]) -> Iterator[str]:
    """Paths of the configs among arguments of the command line."""
    for number, word in enumerate(arguments):
        if word.startswith("--config="):
            yield word.removeprefix("--config=")
        elif word in ("--config", "-c"):
            yield from arguments[number + 1 : number + 2]


def _kind(path: str) -> str | None:
    """Which of our modules a config is for; None for an overlay, for a user's own module, and for a file that cannot be read."""
    try:
        content: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # the parser will report what is wrong with it
        return None
    model = content.get("model") if isinstance(content, Mapping) else None
    if isinstance(model, str):
        model = {"class_path": model}
    if not isinstance(model, Mapping):
        return None
    named = model.get("class_path", _KINDS[0] if content.keys() >= _WHOLE else None)
    name = str(named).rpartition(".")[2]
    return name if name in _KINDS else None
