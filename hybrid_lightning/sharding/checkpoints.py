"""Write and read checkpoints. A checkpoint is complete or absent, even if a process is killed while it writes or removes one.

- `WholeFiles` writes a checkpoint as one file, under every strategy; folders are written by `FSDP2Strategy`.
- The functions find and read a checkpoint before a run.
"""

import os
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from fsspec.utils import get_protocol
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy

from hybrid_lightning.errors import CheckpointError
from hybrid_lightning.sharding.atomic import discard, put_in_place, remove, replaced_path, unfinished_path
from hybrid_lightning.sharding.sharded_folder import is_sharded_checkpoint, read_folder, read_meta

_SHOWN = 4  # number of checkpoints that an error names


def is_local(path: str | Path) -> bool:
    """Whether a path is in a file system, and not a URL of another protocol."""
    return bool(get_protocol(str(path)) == "file")


class WholeFiles(TorchCheckpointIO):
    """Writes a file next to its place, waits for the disk, then renames it; also reads the folders of sharded checkpoints.

    Lightning's own class writes into the folder for temporary files, which may be on another disk, so that moving the file is not
    one step. It also removes a folder file by file.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save a checkpoint; an existing file or folder with this name is replaced once the new one is safe.

        Raises:
            CheckpointError: If it could not be written; the existing one stays.
        """
        if storage_options is not None or not is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        part = unfinished_path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            discard(part)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # after an OSError torch closes the file, and fails again with a RuntimeError
            with suppress(OSError):
                discard(part)  # it takes up space, which may be needed
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            raise CheckpointError(f"{path} could not be written: {cause}; an earlier checkpoint is unchanged") from error
        put_in_place(path)

    def load_checkpoint(self, path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Read a checkpoint; the parts of a sharded one are joined into whole tensors."""
        if is_sharded_checkpoint(path):
            return read_folder(Path(path))
        return super().load_checkpoint(path, *arguments, **options)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint; an incomplete one never has its name."""
        if is_local(path):
            remove(Path(path))
        else:
            super().remove_checkpoint(path)


def write_whole_files(strategy: Strategy) -> None:
    """Let a strategy write checkpoints with `WholeFiles`, unless it was given another class for checkpoints."""
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = WholeFiles()


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read the content of a checkpoint: a sharded one without its tensors; tensors of a file are loaded only on use.

    Raises:
        CheckpointError: If it cannot be read, or is incomplete.
    """
    path = Path(path)
    if checkpoint_exists(path) and path.is_dir():
        return read_meta(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read: it is not a checkpoint, or damaged; give another one") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a checkpoint, but a {type(content).__name__}; give another one")
    return content


def require_checkpoint(path: str | Path) -> None:
    """Check that there is a file or folder at the path of a checkpoint; paths on other machines are left to Lightning.

    Raises:
        CheckpointError: If there is none; the message names other checkpoints nearby.
    """
    if not is_local(path) or checkpoint_exists(path):
        return
    path = Path(path)
    place = next(folder for folder in path.absolute().parents if folder.is_dir())
    found = sorted(_checkpoints_in(place), key=lambda near: near.stat().st_mtime, reverse=True)[:_SHOWN]
    near = [str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file) for file in found]
    remedy = f"give an existing one, such as {' or '.join(near)}" if near else f"give the path of one; {place} has none"
    raise CheckpointError(f"there is no checkpoint {path} (looked for {path.absolute()}); {remedy}")


def checkpoint_exists(path: str | Path) -> bool:
    """Whether there is a file or folder at a path.

    Raises:
        CheckpointError: If it is missing because a process was killed while it replaced it.
    """
    path = Path(path)
    if not path.exists() and replaced_path(path).exists():
        raise CheckpointError(
            f"{path} is missing, since a process was killed while replacing it; the previous one is complete: rename "
            f"{replaced_path(path)} to {path.name}"
        )
    return path.exists()


def _checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoints in a folder; if it has none, the ones in the checkpoint folders of the run or runs that it contains."""
    patterns = [f"{above}*.ckpt" for above in ("", "checkpoints/", "*/checkpoints/", "*/*/checkpoints/", "runs/*/*/checkpoints/")]
    return next((found for pattern in patterns if (found := list(folder.glob(pattern)))), [])
