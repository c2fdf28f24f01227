"""`GlooReceiver`: receives the policy's weights in a vLLM server, over gloo, on CPUs and wherever NCCL cannot be had.

This file runs in the server's workers, which find it by the name that the package registers. The sender is in `transfer.py`. Each
update comes as one message with the names and shapes of all its weights, followed by their values, one broadcast each.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo, TCPStore
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from hybrid_lightning.rollout.vllm import LACKS
from hybrid_lightning.rollout.vllm.transfer import check_facts, check_joined, facts_of, gloo_group, local_address


@dataclass
class GlooInit(WeightTransferInitInfo):
    """Where the sender is, and which model it has."""

    host: str
    port: int  # 0: the model is compared, and nothing else
    ranks: int  # the sender and all workers of this server
    timeout_s: float
    config: dict[str, Any] = field(default_factory=dict)  # what the model's config has to say (see `facts_of`)


@dataclass
class GlooUpdate(WeightTransferUpdateInfo):
    """The weights of an update, in the order in which they come."""

    names: list[str]
    shapes: list[list[int]]
    dtype: str
    everything: bool = False  # whether these are all weights of the policy


class GlooReceiver(WeightTransferEngine[GlooInit, GlooUpdate]):
    """Receives weights by broadcasts of rank 0, the sender."""

    init_info_cls = GlooInit
    update_info_cls = GlooUpdate
    _group: ProcessGroupGloo | None = None
    _loaded: set[str] | None = None  # names of vLLM's weights that came, where all should have come

    def init_transfer_engine(self, init_info: GlooInit) -> None:
        """Connect to the sender.

        Raises:
            ValueError: If this server has another model than the sender.
        """
        check_facts(facts_of(self.model_config.hf_config), init_info.config)
        if init_info.port == 0:
            return
        self.shutdown()
        parallel = self.parallel_config
        rank = 1 + parallel.data_parallel_index * parallel.world_size + parallel.rank
        limit = timedelta(seconds=init_info.timeout_s)
        store = TCPStore(init_info.host, init_info.port, is_master=False, timeout=limit)
        store.set(f"worker {rank}", "")
        address = local_address(f"tcp://{init_info.host}:{init_info.port}")
        self._group = gloo_group(store, rank, init_info.ranks, address, limit)

    def start_weight_update(self) -> None:
        """Let vLLM expect weights."""
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        """Put weights that did not come back in place, and share those that are tied.

        Raises:
            ValueError: If all weights should have come, and the policy lacks one of vLLM's model.
        """
        loaded, self._loaded = self._loaded, None
        finalize_layerwise_reload(self.model, self.model_config)
        if loaded is not None:  # tied weights have one name from here on
            missing = {name for name, _ in self.model.named_parameters()} - loaded
            if missing:
                raise ValueError(f"{LACKS} {min(missing)}: vLLM knows this architecture under other names")
            pack_tied(self.model)

    def receive_weights(self, update_info: GlooUpdate) -> None:
        """Receive the weights of one update.

        Raises:
            ValueError: If a joined layer would get only some of its parts.
        """
        try:
            check_joined(update_info.names, self.model)
            loaded = self.model.load_weights(self._received(update_info))
            self._loaded = set(loaded or ()) if update_info.everything else None
        except BaseException:
            self.shutdown()  # so that the sender does not wait
            abandon(self.model, self.model_config)
            raise

    def _received(self, update: GlooUpdate) -> Iterator[tuple[str, torch.Tensor]]:
        assert self._group is not None, "init_transfer_engine has to be called first"
        for name, shape in zip(update.names, update.shapes, strict=True):
            value = torch.empty(shape, dtype=getattr(torch, update.dtype))
            self._group.broadcast(value, 0).wait()  # type: ignore[attr-defined]  # which torch does not declare
            yield name, value.to(self.device)

    def shutdown(self) -> None:
        """Close the connection."""
        self._group = None


def abandon(model: torch.nn.Module, config: Any) -> None:
    """Drop layers that came in part, after which the model can compute, and can be given all weights again.

    Layers that came whole stay. The version of the weights, which is set at the end, tells the sender to send all again.
    """
    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load():
            info.loaded_weights.clear()
            info.load_numel = 0
    finalize_layerwise_reload(model, config)


def pack_tied(model: torch.nn.Module) -> None:
    """Pack weights again that two layers share: on a CPU the output layer keeps a packed copy of a tied embedding.

    vLLM makes it when it loads a model, and not when it gets weights anew.
    """
    sharing: dict[int, list[torch.nn.Module]] = {}
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.numel():
            sharing.setdefault(weight.data_ptr(), []).append(layer)
    for layers in sharing.values():
        for layer in layers if len(layers) > 1 else ():
            if hasattr(layer, "cpu_linear"):
                layer.quant_method.process_weights_after_loading(layer)  # type: ignore[union-attr, operator]
