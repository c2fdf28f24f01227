"""`GlooReceiver`: receives the policy's weights in a vLLM server, over gloo, on CPUs and wherever NCCL is not available.

This file runs in the server's workers, which find it by the name that the package registers. The sender is in `transfer.py`. Each
update comes as one message with the names and shapes of all its weights, followed by their values, one broadcast each.
"""

import shutil
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo, TCPStore
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from hybrid_lightning.errors import RolloutError
from hybrid_lightning.rollout.interface import PEFT_PREFIX
from hybrid_lightning.rollout.vllm import MISSING
from hybrid_lightning.rollout.vllm.adapter import check_applied, split, write_folder
from hybrid_lightning.rollout.vllm.transfer import check_facts, check_joined, facts_of, gloo_group, local_address


@dataclass
class GlooInit(WeightTransferInitInfo):
    """Place of the sender, and its model."""

    host: str
    port: int  # 0: only compare the model
    ranks: int  # the sender and all workers of this server
    timeout_s: float
    config: dict[str, Any] = field(default_factory=dict)  # required values in the model's config (see `facts_of`)


@dataclass
class GlooUpdate(WeightTransferUpdateInfo):
    """The weights of an update, in the order of arrival."""

    names: list[str]
    shapes: list[list[int]]
    dtype: str
    everything: bool = False  # whether these are all weights of the policy
    adapter: dict[str, Any] | None = None  # PEFT's config of the LoRA factors among them
    folder: str = ""  # where they are written, for vLLM to load them


class GlooReceiver(WeightTransferEngine[GlooInit, GlooUpdate]):
    """Receives weights by broadcast from rank 0, the sender."""

    init_info_cls = GlooInit
    update_info_cls = GlooUpdate
    _group: ProcessGroupGloo | None = None
    _folder: Path | None = None  # of LoRA that arrived

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
        """Nothing to prepare: an update comes as one message, and is loaded as a whole."""

    def finish_weight_update(self) -> None:
        """Nothing is left to do."""

    def receive_weights(self, update_info: GlooUpdate) -> None:
        """Receive and load the weights of one update.

        Raises:
            RolloutError: If vLLM's model needs weights that are not among these. See `load_weights` for other errors.
        """
        factors: dict[str, torch.Tensor] = {}
        separate = [name for name in update_info.names if name.startswith(PEFT_PREFIX)]
        received = split(self._received(update_info), factors)
        try:
            if update_info.adapter is not None:
                check_applied(self.model, separate)
            if len(separate) < len(update_info.names):
                load_weights(self.model, self.model_config, received, update_info.everything)
            deque(received, maxlen=0)
            if update_info.adapter is not None:
                self._folder = Path(update_info.folder)
                write_folder(self._folder, update_info.adapter, {name: value.cpu() for name, value in factors.items()})
                self.model.lora_manager.remove_all_adapters()  # type: ignore[union-attr, operator]  # so that it is read again
        except BaseException:
            self.shutdown()  # so that the sender does not wait
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
        shutil.rmtree(self._folder or "", ignore_errors=True)


def load_weights(model: Any, config: Any, weights: Iterator[tuple[str, torch.Tensor]], everything: bool) -> None:
    """Load weights (name and value) layer by layer into vLLM's model; `everything` if these are all weights of the policy.

    Layers that arrive in part are dropped if this fails: the model can then compute, and receive all weights again. Layers that
    arrived whole stay. The version of the weights, which is set at the end, makes the sender send all of them again.

    Raises:
        ValueError: If a joined layer receives only some of its parts. No part of it is loaded then.
        RolloutError: If the model has weights that are not among these.
    """
    names: list[str] = []

    def noted() -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in weights:
            names.append(name)
            yield name, value
        check_joined(names, model)

    initialize_layerwise_reload(model)
    try:
        loaded = set(model.load_weights(noted()) or ())
    except BaseException:
        for layer in model.modules():
            info = get_layerwise_info(layer)
            if info.can_load():
                info.loaded_weights.clear()
                info.load_numel = 0
        raise
    finally:
        finalize_layerwise_reload(model, config)
    pack_experts(model, loaded)
    if not everything:
        return
    pack_tied(model)
    # Tied weights have one name by now. With LoRA, the layers of vLLM's model contain the base's weights.
    has, came = ({name.replace(".base_layer.", ".") for name in some} for some in (dict(model.named_parameters()), loaded))
    if missing := has - came:
        raise RolloutError(
            f"{MISSING} {len(missing)} weights that vLLM has, such as {min(missing)!r}: vLLM knows this architecture under other "
            "names; leave model.sampler out to sample without vLLM"
        )


def pack_experts(model: torch.nn.Module, loaded: set[str]) -> None:
    """Pack experts that arrived: on a CPU vLLM (0.32) packs them when it loads a model, but not when it receives new weights."""
    for name, layer in model.named_modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        if kernel is not None and f"{name}.w13_weight" in loaded and next(layer.parameters()).device.type == "cpu":
            kernel.fused_experts.process_weights_after_loading(layer)


def pack_tied(model: torch.nn.Module) -> None:
    """Repack weights that two layers share: on a CPU the output layer keeps a packed copy of a tied embedding.

    vLLM makes the copy when it loads a model, but not when it receives new weights.
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
