"""`FSDP1Strategy`: weights, gradients and optimizer state split over all ranks, by torch's `FullyShardedDataParallel`.

For clusters that are bound to it. FSDP1 lays all weights of a block into one tensor, which has one dtype and one gradient: the
frozen weights are float32 and their gradients are computed, too. `FSDP2Strategy` does neither and is the one to choose.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import FSDPPrecision, Precision
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch import nn
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.optim import Optimizer

from hybrid_lightning.sharding.blocks import decoder_blocks
from hybrid_lightning.sharding.forward import is_sharded
from hybrid_lightning.sharding.names import parameter_names
from hybrid_lightning.sharding.optimizer_state import check_names
from hybrid_lightning.sharding.ranks import send_trained_weights


class FSDP1Strategy(FSDPStrategy):
    """Lightning's strategy for FSDP1, which splits the model by its decoder blocks; all weights are float32.

    Checkpoints are as those of `FSDP2Strategy`.

    Args:
        process_group_backend: Such as `nccl` or `gloo`; None chooses by the device.
        timeout: How long a process waits for the others before it gives up.
    """

    def __init__(self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning asks for `load_optimizer_state_dict`."""
        return True

    @property
    def precision_plugin(self) -> FSDPPrecision:
        """Autocast on the device that there is, and a norm over all ranks."""
        plugin = self._precision_plugin
        return plugin if isinstance(plugin, _Precision) else _Precision(self, "32-true")

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        if isinstance(precision_plugin, FSDPPrecision):
            precision_plugin = _Precision(self, precision_plugin.precision)
        self._precision_plugin = precision_plugin

    def shard(self, model: nn.Module) -> nn.Module:
        """Split a model that every rank has in full, with the trained weights of rank 0."""
        if is_sharded(model):
            return model
        send_trained_weights(model, self.root_device)
        kinds = {type(block) for block in decoder_blocks(model)}
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy(kinds),
            device_id=self.root_device,
            use_orig_params=True,  # frozen and trained weights in one unit
        )

    # ---- checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights, on rank 0 alone."""
        module = self.lightning_module
        assert module is not None
        with self._whole_states(module, rank0_only=True):
            state = module.state_dict()
        return state if self.is_global_zero else {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """State with whole tensors by name, on rank 0 alone."""
        module = self.lightning_module
        assert module is not None
        optimizer = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        with self._whole_states(module, rank0_only=True):
            state = FullyShardedDataParallel.optim_state_dict(module, optimizer)
        if not self.is_global_zero:
            return {}
        names = parameter_names(module)
        groups = [
            {**{key: value for key, value in group.items() if key != "params"}, "params": [names[p] for p in group["params"]]}
            for group in optimizer.param_groups
        ]
        return {"state": state["state"], "param_groups": groups}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the file, on every rank."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this rank's part of each weight."""
        module = self.lightning_module
        assert module is not None
        with self._whole_states(module, rank0_only=False):
            module.load_state_dict(dict(checkpoint["state_dict"]), strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's part of each moment.

        Raises:
            CheckpointError: If the state is of other parameters.
        """
        module = self.lightning_module
        assert module is not None
        names = parameter_names(module)
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            check_names(saved, optimizer, names)
            with self._whole_states(module, rank0_only=False):
                state = FullyShardedDataParallel.optim_state_dict_to_load(module, optimizer, saved)
            optimizer.load_state_dict(state)

    @contextmanager
    def _whole_states(self, module: nn.Module, rank0_only: bool) -> Iterator[None]:
        offload = self.root_device.type != "cpu"
        with FullyShardedDataParallel.state_dict_type(
            module,
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(offload_to_cpu=offload, rank0_only=rank0_only and offload),
            FullOptimStateDictConfig(offload_to_cpu=offload, rank0_only=rank0_only and offload),
        ):
            yield


class _Precision(FSDPPrecision):
    """Lightning's refuses to clip by norm, since it does not know the root, casts on CUDA only, and takes no frozen batch."""

    def __init__(self, strategy: FSDP1Strategy, precision: Any) -> None:
        super().__init__(precision)
        self.strategy = strategy

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Clip by the norm over all ranks."""
        module = self.strategy.lightning_module
        assert module is not None
        roots = [part for part in module.modules() if isinstance(part, FullyShardedDataParallel) and part.check_is_root()]
        for root in roots:
            root.clip_grad_norm_(clip_val)

    def forward_context(self) -> AbstractContextManager:
        """Autocast, where the precision is mixed."""
        enabled = self.precision == "bf16-mixed"
        return torch.autocast(self.strategy.root_device.type, dtype=torch.bfloat16, enabled=enabled)

    def convert_input(self, data: Any) -> Any:
        """Rollouts are float32 where they are floating-point numbers."""
        return data

    def convert_output(self, data: Any) -> Any:
        """So are losses."""
        return data
