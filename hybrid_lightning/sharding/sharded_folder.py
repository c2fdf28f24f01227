"""Sharded checkpoints: folders to which every rank writes its own part of the weights and of the optimizer state.

    NAME/.metadata      the file of each part of each tensor
    NAME/__R_0.distcp   the parts that rank R has written
    NAME/meta.pt        everything else in a checkpoint file: plan, rollouts, loops, random states, ...

The first two are files of torch.distributed.checkpoint. Tensors have the same names as in a checkpoint file: weights
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
from hybrid_lightning.sharding.atomic import discard, flush, put_in_place, unfinished_path
from hybrid_lightning.sharding.ranks import first_rank_does

_META = "meta.pt"  # Lightning's name

Target = Callable[[tuple[str, ...], torch.Size, torch.dtype], Tensor | None]
"""Returns the tensor to read into, given the keys of a tensor such as ("state_dict", NAME), its whole size and its dtype; None
leaves it out."""


def write_folder(content: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint on all ranks together; an existing file or folder with this name is replaced once the new one is safe.

    The content is the same as in a checkpoint file, except that the tensors in `state_dict` and `optimizer_states` are the parts
    of this rank; content that is not split is taken from the first rank. All ranks have to share the file system of the path.

    Raises:
        CheckpointError: If it could not be written, on all ranks; the existing one stays.
    """
    part = unfinished_path(path)
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
        raise CheckpointError(f"{path} could not be written: {_cause(error)}; an earlier checkpoint is unchanged") from error


def is_sharded_checkpoint(path: Any) -> bool:
    """Whether a checkpoint is sharded, that is, a folder."""
    return isinstance(path, (str, Path)) and Path(path).is_dir()


def read_meta(path: Path) -> dict[str, Any]:
    """Read everything except the tensors; CheckpointError if it is not a sharded checkpoint, or incomplete."""
    try:
        content = torch.load(path / _META, map_location="cpu", weights_only=True)
        _check_files(path, _metadata(path))
    except CheckpointError:
        raise
    except (RuntimeError, OSError, EOFError, UnpicklingError) as error:
        raise CheckpointError(
            f"{path} cannot be read: it is not a sharded checkpoint, or incomplete; give another one"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a checkpoint: {_META} is a {type(content).__name__}; give another one")
    return content


def read_folder(path: Path, target: Target | None = None, together: bool = False) -> dict[str, Any]:
    """Read a checkpoint into the form of a checkpoint file.

    `target` chooses the tensor to read each tensor into; None reads all tensors whole, on the CPU. If `together`, all ranks read
    at once, each into its own parts; if not, this rank reads by itself.

    Raises:
        CheckpointError: If it is not a sharded checkpoint, or incomplete.
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
        what = cause if isinstance(cause, OSError) else type(cause).__name__  # torch's message recommends an unsafe option
        raise CheckpointError(f"{path} cannot be read: a part of it is damaged ({what}); give another one") from error
    return _join(content, {keys[name]: tensor for name, tensor in tensors.items()})


def read_weights(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Any]:
    """Read a checkpoint with whole weights on the CPU, only names that are `wanted`, and without the tensors of optimizers.

    Raises:
        CheckpointError: If it is not a sharded checkpoint, or incomplete.
    """

    def target(keys: tuple[str, ...], size: torch.Size, dtype: torch.dtype) -> Tensor | None:
        return torch.empty(size, dtype=dtype) if keys[0] == "state_dict" and wanted(keys[1]) else None

    return read_folder(path, target)


def _split(content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separate the content of a checkpoint into the tensors of weights and optimizers, and the rest."""
    rest = {name: value for name, value in content.items() if name != "state_dict"}
    tensors: dict[str, Any] = {"state_dict": content["state_dict"]}
    if "optimizer_states" in content:  # and not only weights
        rest["optimizer_states"] = [{**state, "state": {}} for state in content["optimizer_states"]]
    for number, state in enumerate(content.get("optimizer_states", [])):
        parts, others = ({name: dict[str, Any]() for name in state["state"]} for _ in range(2))
        tensors[f"optimizer_{number}"], rest["optimizer_states"][number]["state"] = {"state": parts}, others
        for name, entry in state["state"].items():
            for key, value in entry.items():
                (parts if isinstance(value, Tensor) else others)[name][key] = value
    return tensors, rest


def _join(rest: dict[str, Any], tensors: Mapping[tuple[str, ...], Tensor]) -> dict[str, Any]:
    """The inverse of `_split`."""
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
    """Raise CheckpointError if a file is missing or too short, which is quick to see."""
    ends: dict[str, int] = {}
    for place in stored.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        file = path / name
        if not file.is_file() or file.stat().st_size < end:
            what = "cut short" if file.is_file() else "missing"
            raise CheckpointError(
                f"{path} is incomplete: {name} is {what}; give another checkpoint, in a file system that all processes share"
            )


def _cause(error: BaseException) -> BaseException:
    """The first error on any rank; Ctrl-C, which torch also wraps, is raised again as it was."""
    if isinstance(error, distributed_checkpoint.CheckpointException):
        error = next(iter(error.failures.values()))[0]
        if not isinstance(error, Exception):
            raise error
    return error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's warning that only one process reads or writes, which is intended here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
