"""Checkpoints that are there whole or not at all, however the process ends while it writes or removes one.

`SplitCheckpoints`: what strategies that split a model have in common as they write and read checkpoints.
"""

import os
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch import Tensor

from hybrid_lightning.errors import CheckpointError, ConfigError
from hybrid_lightning.sharding.atomic import discard, part_of, put_in_place, remove, replaced_by
from hybrid_lightning.sharding.sharded_folder import is_folder, read_folder, read_meta, write_folder

_SHOWN = 4  # checkpoints that an error names


class WholeFiles(TorchCheckpointIO):
    """Writes beside the file, waits for the disk, then renames; and reads the folders of sharded checkpoints, too.

    Lightning's own writes in the folder for temporary files, which may be on another disk, from where a file is not moved in one
    go, and removes a folder file by file.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save a checkpoint; a file or folder of this name is replaced once the new one is safe.

        Raises:
            CheckpointError: If it could not be written; what was there stays.
        """
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        part = part_of(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            discard(part)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch ends the file after the first, and fails again
            with suppress(OSError):
                discard(part)  # it takes what room there is
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            raise CheckpointError(f"{path} could not be written: {cause}; what was there before is as it was") from error
        put_in_place(path)

    def load_checkpoint(self, path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Read a checkpoint, of a sharded one every tensor whole."""
        if is_folder(path):
            return read_folder(Path(path))
        return super().load_checkpoint(path, *arguments, **options)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, which has its name no longer when the first of it goes."""
        if _is_local_file_protocol(path):
            remove(Path(path))
        else:
            super().remove_checkpoint(path)


def write_whole_files(strategy: Strategy) -> None:
    """Let a strategy write checkpoints this way, unless it has been given another."""
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = WholeFiles()


def is_there(path: str | Path) -> bool:
    """Whether there is something at a path.

    Raises:
        CheckpointError: If there is nothing, because a process was killed as it replaced it.
    """
    path = Path(path)
    if not path.exists() and replaced_by(path).exists():
        raise CheckpointError(
            f"{path} is missing, since a process was killed as it put a new one in its place; the one before is whole: rename "
            f"{replaced_by(path)} to {path.name}"
        )
    return path.exists()


def require_checkpoint(path: str | Path) -> None:
    """Make sure that there is something at the path of a checkpoint; what is not on this machine is left to Lightning.

    Raises:
        CheckpointError: If there is nothing; it names checkpoints that lie near.
    """
    if not _is_local_file_protocol(path) or is_there(path):
        return
    path = Path(path)
    place = next(folder for folder in path.absolute().parents if folder.is_dir())
    found = sorted(_checkpoints_in(place), key=lambda near: near.stat().st_mtime, reverse=True)[:_SHOWN]
    near = [str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file) for file in found]
    remedy = f"give one that is there, such as {' or '.join(near)}" if near else f"give the path of one; {place} has none"
    raise CheckpointError(f"there is no checkpoint {path} (looked for {path.absolute()}); {remedy}")


def _checkpoints_in(folder: Path) -> list[Path]:
    """Those in a folder or, of a run or of all runs, in the folders where they have theirs."""
    patterns = [f"{above}*.ckpt" for above in ("", "checkpoints/", "*/checkpoints/", "*/*/checkpoints/", "runs/*/*/checkpoints/")]
    return next((found for pattern in patterns if (found := list(folder.glob(pattern)))), [])


def read_content(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds; of a sharded one everything but the tensors, and of a file these only when they are used.

    Raises:
        CheckpointError: If it cannot be read, or is not whole.
    """
    path = Path(path)
    if is_there(path) and path.is_dir():
        return read_meta(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read: it is no checkpoint, or damaged; give another one") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no checkpoint, but a {type(content).__name__}; give another one")
    return content


class SplitCheckpoints(ParallelStrategy):
    """Writes a checkpoint as one file with whole tensors, or as a folder into which each rank writes its parts.

    Either can be resumed from under every strategy and with every number of ranks; where the model is split, each rank reads of a
    folder no more than its own parts.
    """

    writes_folders: bool = False

    @abstractmethod
    def parts(self) -> Mapping[str, Tensor]:
        """Name -> parameter or buffer as `lightning_module_state_dict` splits it, of what is split."""

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning asks for `load_optimizer_state_dict`."""
        return True

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None) -> None:
        """Write on all ranks together, or on the first."""
        if not self.writes_folders:
            Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)
            return
        if storage_options is not None:
            raise ConfigError("storage_options has no meaning for a sharded checkpoint, which is a folder; leave it out")
        write_folder(checkpoint, Path(self.broadcast(filepath)))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file, on every rank the whole of it; or of a folder what this rank needs."""
        if not Path(checkpoint_path).is_dir():
            return Strategy.load_checkpoint(self, checkpoint_path, weights_only)
        parts = self.parts()

        def target(keys: tuple[str, ...], size: torch.Size, dtype: torch.dtype) -> Tensor | None:
            if keys[0] != "state_dict" and not self.optimizers:
                return None
            part = parts.get(keys[1] if keys[0] == "state_dict" else keys[2])
            if part is None or part.shape != size:  # a counter of the optimizer, or what is going to be refused
                return torch.empty(size, dtype=dtype)
            return torch.empty_like(part, dtype=dtype)

        return read_folder(Path(checkpoint_path), target, together=True)
