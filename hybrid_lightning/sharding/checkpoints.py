"""`SplitCheckpoints`: what strategies that split a model have in common as they write and read checkpoints."""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch import Tensor

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.sharding.sharded_folder import read_folder, write_folder


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
