"""A trained policy out of a checkpoint: a file, or the folder of a sharded one, whatever strategy wrote it."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from hybrid_lightning.adapters.plan import AdapterPlan
from hybrid_lightning.errors import CheckpointError
from hybrid_lightning.export.trained import TrainedPolicy, base_of, training_of
from hybrid_lightning.export.weights import is_trained, peft_weights
from hybrid_lightning.policy.adaptation import adapter_state

_SHARDED_METADATA = "meta.pt"  # where Lightning keeps what is not sharded
_SHARDED_STATES = ("state_dict", "model")  # of FSDP2 and of FSDP1


def policy_of_checkpoint(path: str | Path, arguments: Mapping[str, Any] | None = None, datamodule: Any = None) -> TrainedPolicy:
    """Read plan and trained weights; one process does so for any number that wrote them.

    Args:
        path: File or folder.
        arguments: Of the module, to use instead of those in the checkpoint: where the base model has been moved.
        datamodule: Of the training, for the model card.

    Raises:
        CheckpointError: If there is no such checkpoint, or it has no adapter.
        ConfigError: If neither the checkpoint nor `arguments` name the base model.
    """
    path = Path(path)
    content = _read(path)
    saved = adapter_state(content)["plan"]
    if saved is None:
        raise CheckpointError(f"{path} was saved without an adapter: nothing in it has been trained; give another checkpoint")
    plan = AdapterPlan.from_dict(saved, source=str(path))
    state = _sharded_state(path) if path.is_dir() else content["state_dict"]
    # Lightning keeps under this name what a module was made with.
    arguments = {**content.get("hyper_parameters", {}), **(arguments or {})}
    summary = content.get("callbacks", {}).get("RunSummary")
    return TrainedPolicy(
        plan=plan,
        weights=peft_weights(state, plan, str(path)),
        base=base_of(arguments),
        training=training_of(content.get("global_step", 0), arguments, summary, datamodule),
    )


def _read(path: Path) -> dict[str, Any]:
    """Everything, or of a sharded checkpoint everything but the weights."""
    file = path / _SHARDED_METADATA if path.is_dir() else path
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=not path.is_dir())
    except (RuntimeError, OSError, EOFError, UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read: it is no checkpoint, or damaged; give another one") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no checkpoint, but a {type(content).__name__}; give another one")
    return content


def _sharded_state(path: Path) -> dict[str, Tensor]:
    """The adapter's weights, put together from their shards; optimizer states are not read."""
    try:
        stored = distributed_checkpoint.FileSystemReader(path).read_metadata().state_dict_metadata
        state: dict[str, Tensor] = {}
        for name, entry in stored.items():
            if name.startswith(_SHARDED_STATES) and is_trained(name) and isinstance(entry, TensorStorageMetadata):
                state[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        distributed_checkpoint.load(state, checkpoint_id=path, no_dist=True)
    except (distributed_checkpoint.CheckpointException, OSError, EOFError, UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read: it is no sharded checkpoint, or not whole; give another one") from error
    return state
