"""`FSDP1Strategy`: weights, gradients and optimizer state split over all ranks, by torch's `FullyShardedDataParallel`.

For clusters that are bound to it. FSDP1 lays all weights of a block into one tensor, which has one dtype and one gradient: the
frozen weights are float32 as the trained ones are, or all are bfloat16 (`bf16-true`), and the gradients of the frozen ones are
computed, too. `FSDP2Strategy` does neither and is the one to choose.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.plugins.precision import FSDPPrecision, Precision
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffload,
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
)
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.sharding.checkpoints import SplitCheckpoints
from hybrid_lightning.sharding.parameters import check_names, decoder_blocks, parameter_names, plain_optimizer, trained_names
from hybrid_lightning.sharding.ranks import send_trained_weights
from hybrid_lightning.sharding.weights import split_by_fsdp1


class FSDP1Strategy(SplitCheckpoints, FSDPStrategy):
    """Lightning's strategy for FSDP1, which splits the model by its decoder blocks; all weights have one dtype.

    Checkpoints are as those of `FSDP2Strategy`.

    Args:
        state_dict_type: `full` writes a checkpoint as one file with whole tensors, which are put together on the first process;
            `sharded` as a folder into which each process writes its part.
        cpu_offload: Keep each device's part of weights, gradients and optimizer state in the memory of the host, as
            `FSDP2Strategy` does.
        process_group_backend: Such as `nccl` or `gloo`; None chooses by the device.
        timeout: How long a process waits for the others before it gives up.

    Raises:
        ConfigError: If there is no such type.
    """

    def __init__(
        self,
        state_dict_type: Literal["full", "sharded"] = "full",
        cpu_offload: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        if state_dict_type not in ("full", "sharded"):
            raise ConfigError(f"trainer.strategy.state_dict_type must be full or sharded, got {state_dict_type!r}")
        super().__init__(
            state_dict_type=state_dict_type,
            cpu_offload=cpu_offload,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.writes_folders = state_dict_type == "sharded"
        self._sums: dict[nn.Parameter, Tensor] = {}  # of gradients, where weights are offloaded

    @property
    def offloads(self) -> bool:
        """Whether weights lie elsewhere than where they are computed with; for that FSDP1 pins memory, which a CPU cannot."""
        assert self.cpu_offload is not None
        return self.cpu_offload.offload_params and self.root_device.type != "cpu"

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
        if isinstance(model, FullyShardedDataParallel):
            return model
        send_trained_weights(model, self.root_device)
        return split_by_fsdp1(
            model,
            decoder_blocks(model),
            cpu_offload=CPUOffload(self.offloads),
            device_id=self.root_device,
            device_mesh=init_device_mesh(self.root_device.type, (self.world_size,)),  # parts then say what they are part of
            use_orig_params=True,  # frozen and trained weights in one unit
        )

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *arguments: Any, **options: Any) -> Tensor:
        """Run a backward pass, after which gradients are those of all passes since the last optimizer step.

        With weights on the host FSDP1 has those of the last pass alone, as its documentation says: it cannot add on the device to
        what lies on the host.
        """
        loss = super().backward(closure_loss, optimizer, *arguments, **options)
        for weight in self.module.parameters() if self.offloads else ():
            if weight.grad is not None:
                earlier = self._sums.get(weight)
                self._sums[weight] = weight.grad.clone() if earlier is None else earlier.add_(weight.grad)
                weight.grad.copy_(self._sums[weight])
        return loss

    def optimizer_step(self, optimizer: Optimizer, closure: Any, model: Any = None, **options: Any) -> Any:
        """Make a step, after which gradients begin anew."""
        result = super().optimizer_step(optimizer, closure, model, **options)
        self._sums = {}
        return result

    # ---- checkpoints

    def parts(self) -> Mapping[str, Tensor]:
        """All weights, gathered and split anew by their rows; FSDP1 itself splits all of a block as one."""
        with self._states(split=True):
            return dict(self.module.state_dict())

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Weights, whole and on rank 0 alone unless they go into a folder."""
        with self._states(self.writes_folders, rank0_only=True):
            state = self.module.state_dict()
        return state if self.is_global_zero or self.writes_folders else {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """State by name, with whole tensors and on rank 0 alone unless it goes into a folder."""
        optimizer = plain_optimizer(optimizer)
        with self._states(self.writes_folders, rank0_only=True):
            state = FullyShardedDataParallel.optim_state_dict(self.module, optimizer)
        if not self.is_global_zero and not self.writes_folders:
            return {}
        names = parameter_names(self.module)
        groups = [
            {**{key: value for key, value in group.items() if key != "params"}, "params": [names[p] for p in group["params"]]}
            for group in optimizer.param_groups
        ]
        return {"state": state["state"], "param_groups": groups}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this rank's part of each weight."""
        state = dict(checkpoint["state_dict"])
        split = any(isinstance(value, DTensor) for value in state.values())
        if split:  # FSDP1 warns of each weight that it is not given, and the frozen ones are in no checkpoint
            trained = trained_names(self.module)
            state |= {name: value for name, value in self.parts().items() if name not in trained}
        with self._states(split):
            self.module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's part of each moment.

        Raises:
            CheckpointError: If the state is of other parameters.
        """
        names = parameter_names(self.module)
        split = any(isinstance(value, DTensor) for value in checkpoint["state_dict"].values())
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            check_names(saved, optimizer, names)
            with self._states(split):
                state = FullyShardedDataParallel.optim_state_dict_to_load(self.module, optimizer, saved)
            optimizer.load_state_dict(state)

    def _states(self, split: bool, rank0_only: bool = False) -> AbstractContextManager:
        """Within this context, the module's states are of parts, or whole and on the CPU."""
        configs: Any = (ShardedStateDictConfig(), ShardedOptimStateDictConfig())
        kind = StateDictType.SHARDED_STATE_DICT
        if not split:
            offload = self.root_device.type != "cpu"
            options = {"offload_to_cpu": offload, "rank0_only": rank0_only and offload}
            kind, configs = StateDictType.FULL_STATE_DICT, (FullStateDictConfig(**options), FullOptimStateDictConfig(**options))
        return FullyShardedDataParallel.state_dict_type(self.module, kind, *configs)


class _Precision(FSDPPrecision):
    # Lightning's refuses to clip by norm, not knowing the root; casts and scales on CUDA only; and takes no frozen batch.

    def __init__(self, strategy: FSDP1Strategy, precision: Any) -> None:
        super().__init__(precision)
        self.strategy = strategy

    def connect(self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]) -> tuple[Any, Any, Any]:
        if self.scaler is not None:  # of the device that there is, which is known by now; all ranks leave out a step together
            self.scaler = ShardedGradScaler(self.strategy.root_device.type)
        return super().connect(model, optimizers, lr_schedulers)

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        for part in self.strategy.module.modules():
            if isinstance(part, FullyShardedDataParallel) and part.check_is_root():
                part.clip_grad_norm_(clip_val)

    def convert_module(self, module: nn.Module) -> nn.Module:  # buffers, such as the frequencies of positions, keep their dtype
        return module

    def forward_context(self) -> AbstractContextManager:
        dtype = torch.float16 if self.precision == "16-mixed" else torch.bfloat16
        return torch.autocast(self.strategy.root_device.type, dtype=dtype, enabled=self.precision.endswith("mixed"))

    def convert_input(self, data: Any) -> Any:  # float32 already, as losses are
        return data

    convert_output = convert_input
