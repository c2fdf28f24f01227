"""`GlooReceiver`: receives the policy's weights in a vLLM server, over gloo, on CPUs and wherever NCCL cannot be had.

This file runs in the server's workers, which find it by the name that `plugin.py` registers. The sender is in `transfer.py`. Each
update comes as one message with the names and shapes of all its weights, followed by their values, one broadcast each.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info


@dataclass
class GlooInit(WeightTransferInitInfo):
    """Where the sender is, and which model it has."""

    host: str
    port: int
    group: str  # name of the connection
    ranks: int  # the sender and all workers of this server
    timeout_s: float
    config: dict[str, Any] = field(default_factory=dict)  # what the model's config has to say


@dataclass
class GlooUpdate(WeightTransferUpdateInfo):
    """The weights of an update, in the order in which they come."""

    names: list[str]
    shapes: list[list[int]]
    dtype: str


class GlooReceiver(WeightTransferEngine[GlooInit, GlooUpdate]):
    """Receives weights by broadcasts of rank 0, the sender."""

    init_info_cls = GlooInit
    update_info_cls = GlooUpdate
    _group: ProcessGroupGloo | None = None

    def init_transfer_engine(self, init_info: GlooInit) -> None:
        """Connect to the sender.

        Raises:
            ValueError: If this server has another model than the sender.
        """
        mine = self.model_config.hf_text_config.to_dict()
        other = {name: (value, mine.get(name)) for name, value in init_info.config.items() if mine.get(name) != value}
        if other:
            name, (wanted, found) = next(iter(other.items()))
            raise ValueError(f"another model: {name} is {found!r} here, and {wanted!r} in the policy's config")
        self.shutdown()
        parallel = self.parallel_config
        rank = 1 + parallel.data_parallel_index * parallel.world_size + parallel.rank
        limit = timedelta(seconds=init_info.timeout_s)
        store = TCPStore(init_info.host, init_info.port, is_master=False, timeout=limit)
        self._group = ProcessGroupGloo(PrefixStore(init_info.group, store), rank, init_info.ranks, limit)

    def start_weight_update(self) -> None:
        """Let vLLM expect weights."""
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        """Put weights that did not come back in place."""
        finalize_layerwise_reload(self.model, self.model_config)

    def receive_weights(self, update_info: GlooUpdate) -> None:
        """Receive the weights of one update.

        Raises:
            ValueError: If a joined layer would get only some of its parts.
        """
        try:
            check_joined(update_info.names, self.model)
            self.model.load_weights(self._received(update_info))
        except BaseException:
            self._undo()
            raise

    def _received(self, update: GlooUpdate) -> Iterator[tuple[str, torch.Tensor]]:
        assert self._group is not None, "init_transfer_engine has to be called first"
        for name, shape in zip(update.names, update.shapes, strict=True):
            value = torch.empty(shape, dtype=getattr(torch, update.dtype))
            self._group.broadcast(value, 0).wait()  # type: ignore[attr-defined]  # which torch does not declare
            yield name, value.to(self.device)

    def _undo(self) -> None:
        """Drop layers that came in part, and close the connection, so that the sender does not wait.

        Layers that came whole stay. The version of the weights, which is set at the end, tells the sender to send all again.
        """
        self.shutdown()
        for layer in self.model.modules():
            info = get_layerwise_info(layer)
            if info.can_load():
                info.loaded_weights.clear()
                info.load_numel = 0
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Close the connection."""
        self._group = None


def check_joined(names: Collection[str], model: Any) -> None:
    """Make sure that each layer that vLLM joins from several modules gets all of them or none: it would not say so itself.

    Args:
        names: Names of the weights of an update, as in a checkpoint.
        model: vLLM's model.

    Raises:
        ValueError: If one part is missing.
    """
    joined: dict[str, list[str]] = getattr(model, "packed_modules_mapping", None) or {}
    siblings = {part: parts for parts in joined.values() if len(parts) > 1 for part in parts}
    came = set(names)
    for name in names:
        pieces = name.split(".")
        for place, piece in enumerate(pieces):
            for part in siblings.get(piece, ()):
                other = ".".join([*pieces[:place], part, *pieces[place + 1 :]])
                if other not in came and pieces[-1] == "weight":
                    raise ValueError(f"{name} came without {other}, with which vLLM joins it; all parts have to come together")
