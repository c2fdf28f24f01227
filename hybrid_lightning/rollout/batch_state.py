"""Micro-batches as a checkpoint holds them, which is loaded with `weights_only=True`."""

from dataclasses import fields
from typing import Any

from torch import Tensor

from hybrid_lightning.errors import CheckpointError
from hybrid_lightning.types import PolicyBatch, Sequences


def to_state(batch: PolicyBatch) -> dict[str, Any]:
    """Plain data and tensors on the CPU."""
    state = {entry.name: getattr(batch, entry.name) for entry in fields(batch) if entry.name != "sequences"}
    sequences = {entry.name: getattr(batch.sequences, entry.name).cpu() for entry in fields(batch.sequences)}
    state = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in state.items()}
    return {**state, "sequences": sequences}


def from_state(state: dict[str, Any]) -> PolicyBatch:
    """The micro-batch that `to_state` was given.

    Raises:
        CheckpointError: If an earlier version wrote it, without something that is needed now.
    """
    missing = {entry.name for entry in fields(PolicyBatch)} - state.keys()
    if missing:
        raise CheckpointError(
            f"the checkpoint's unfinished rollout lacks {', '.join(sorted(missing))}, so an earlier version wrote it; resume "
            "with that version, or from a checkpoint between two rollouts"
        )
    return PolicyBatch(**{**state, "sequences": Sequences(**state["sequences"])})
