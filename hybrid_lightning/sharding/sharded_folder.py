"""Sharded checkpoints: a folder into which every rank writes its own part of the weights and of the optimizer's state.

    NAME/.metadata      which part of which tensor is in which file
    NAME/__R_0.distcp   the parts that rank R has written
    NAME/meta.pt        what a checkpoint file holds beside these tensors: plan, rollouts, loops, random states, ...

The first two are torch.distributed.checkpoint's. Tensors have the names that they have in a checkpoint file: weights
`state_dict.NAME`, moments `optimizer_0.state.NAME.exp_avg`.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from hybrid_lightning.errors import CheckpointError
from hybrid_lightning.sharding.atomic import discard, flush, part_of, put_in_place
from hybrid_lightning.sharding.ranks import first_rank_does

_META = "meta.pt"  # Lightning's name

Target = Callable[[tuple[str, ...], torch.Size, torch.dtype], Tensor | None]
"""Where to read a tensor into, from its keys such as ("state_dict", NAME), its whole size and its dtype; None leaves it out."""


def write_folder(content: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint on all ranks together; a file or folder of this name is replaced once the new one is safe.

    Args:
        content: As for a checkpoint file, but each rank has its part of the tensors in `state_dict` and `optimizer_states`.
            Of what is not split, that of the first rank counts.
        path: On a file system that all ranks share.

    Raises:
        CheckpointError: If it could not be written, on all ranks; what was there stays.
    """
    part = part_of(path)
    tensors, rest = _split(content)

    def begin() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        discard(part)

    def end() -> None:
        with (part / _META).open("wb") as file:
            torch.save(rest, file)
            file.flush()
        flush(part / _META)
        flush(part)
        _check_files(part, _metadata(part))
        put_in_place(path)

    try:
        first_rank_does(begin)
        with _quiet():
            distributed_checkpoint.save(tensors, checkpoint_id=part)
        first_rank_does(end)
    except (distributed_checkpoint.CheckpointException, CheckpointError) as error:
        cause = _cause(error)
        raise CheckpointError(f"{path} could not be written: {cause}; what was there before is as it was") from error


def is_folder(path: Any) -> bool:
    """Whether a checkpoint is a sharded one, or at least a folder."""
    return isinstance(path, (str, Path)) and Path(path).is_dir()


def read_meta(path: Path) -> dict[str, Any]:
    """Everything but the tensors.

    Raises:
        CheckpointError: If it is no sharded checkpoint, or not whole.
    """
    try:
        content = torch.load(path / _META, map_location="cpu", weights_only=True)
        _check_files(path, _metadata(path))
    except CheckpointError:
        raise
    except (RuntimeError, OSError, EOFError, UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read: it is no sharded checkpoint, or not whole; give another one") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no checkpoint, but has a {type(content).__name__} as {_META}; give another one")
    return content


def read_folder(path: Path, target: Target | None = None, together: bool = False) -> dict[str, Any]:
    """Read a checkpoint into the form that a checkpoint file has.

    Args:
        path: The folder.
        target: Where to read each tensor into; None reads all, whole, on the CPU.
        together: All ranks read, into parts as they have them; else each for itself.

    Raises:
        CheckpointError: If it is no sharded checkpoint, or not whole.
    """
    content = read_meta(path)
    stored = _metadata(path)
    keys: dict[str, tuple[str, ...]] = stored.planner_data
    tensors: dict[str, Tensor] = {}
    for name, entry in stored.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            size, dtype = entry.size, entry.properties.dtype
            place = torch.empty(size, dtype=dtype) if target is None else target(keys[name], size, dtype)
            if place is not None:
                tensors[name] = place
    try:
        with _quiet():
            distributed_checkpoint.load(tensors, checkpoint_id=path, no_dist=not together)
    except (distributed_checkpoint.CheckpointException, OSError, EOFError, UnpicklingError) as error:
        cause = _cause(error)
        what = cause if isinstance(cause, OSError) else type(cause).__name__  # torch's own words advise what is not safe
        raise CheckpointError(f"{path} cannot be read: a part of it is damaged ({what}); give another one") from error
    return _join(content, {keys[name]: tensor for name, tensor in tensors.items()})


def read_weights(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Any]:
    """Read a checkpoint with whole weights on the CPU, but without the tensors of optimizers.

    Args:
        path: The folder.
        wanted: Tells by its name whether a weight is to be read.

    Raises:
        CheckpointError: If it is no sharded checkpoint, or not whole.
    """

    def target(keys: tuple[str, ...], size: torch.Size, dtype: torch.dtype) -> Tensor | None:
        return torch.empty(size, dtype=dtype) if keys[0] == "state_dict" and wanted(keys[1]) else None

    return read_folder(path, target)


def _split(content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors of weights and optimizers by their keys, and the rest."""
    rest = {name: value for name, value in content.items() if name != "state_dict"}
    tensors: dict[str, Any] = {"state_dict": content["state_dict"]}
    if "optimizer_states" not in content:  # of a checkpoint of weights only
        return tensors, rest
    rest["optimizer_states"] = []
    for number, state in enumerate(content["optimizer_states"]):
        entries = state["state"].items()
        tensors[f"optimizer_{number}"] = {
            "state": {name: {key: value for key, value in entry.items() if isinstance(value, Tensor)} for name, entry in entries}
        }
        others = {name: {key: value for key, value in entry.items() if not isinstance(value, Tensor)} for name, entry in entries}
        rest["optimizer_states"].append({**state, "state": others})
    return tensors, rest


def _join(rest: dict[str, Any], tensors: Mapping[tuple[str, ...], Tensor]) -> dict[str, Any]:
    """The converse of `_split`."""
    content = {**rest, "state_dict": {}}
    for keys, tensor in tensors.items():
        if keys[0] == "state_dict":
            content["state_dict"][keys[1]] = tensor
        else:
            _, _, name, key = keys
            state = content["optimizer_states"][int(keys[0].removeprefix("optimizer_"))]["state"]
            state.setdefault(name, {})[key] = tensor
    return content


def _metadata(path: Path) -> Metadata:
    return distributed_checkpoint.FileSystemReader(path).read_metadata()


def _check_files(path: Path, stored: Metadata) -> None:
    """Make sure that every file is there in the length that it had: a quick look, before hours are spent.

    Raises:
        CheckpointError: If one is not.
    """
    ends: dict[str, int] = {}
    for place in stored.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        file = path / name
        if not file.is_file() or file.stat().st_size < end:
            what = "cut short" if file.is_file() else "missing"
            raise CheckpointError(
                f"{path} is not whole: {name} is {what}; give another checkpoint, and let all processes write where all can read"
            )


def _cause(error: BaseException) -> BaseException:
    """What went wrong first, on whatever rank. Torch catches Ctrl-C, too, which is to stay what it is."""
    if isinstance(error, distributed_checkpoint.CheckpointException):
        error = next(iter(error.failures.values()))[0]
        if not isinstance(error, Exception):
            raise error
    return error


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch warns where one process works alone, which is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
