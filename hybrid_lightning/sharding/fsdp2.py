"""`FSDP2Strategy`: splits weights, gradients and optimizer state over all ranks with torch's `fully_shard`.

A checkpoint is one file with whole tensors, or a sharded folder into which each rank writes its own parts. A run can be resumed
from both under every strategy and with every number of ranks. If the model is split, each rank reads only its own parts of a
folder.
"""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torchmetrics import Metric

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.sharding.parameters import check_names, decoder_blocks, is_split_like, parameter_names, plain_optimizer
from hybrid_lightning.sharding.ranks import send_trained_weights
from hybrid_lightning.sharding.sharded_folder import read_folder, write_folder

_OFFLOADS = {"fsdp": False, "fsdp_cpu_offload": True}  # Lightning's names for FSDP -> whether weights are on the host


def chosen_strategy(given: Any) -> Any:
    """The value of `trainer.strategy`, except that Lightning's names `fsdp` and `fsdp_cpu_offload` give an `FSDP2Strategy`.

    Raises:
        ConfigError: If it is Lightning's own strategy with these names, which is FSDP1.
    """
    if isinstance(given, FSDPStrategy):
        raise ConfigError(f"trainer.strategy={type(given).__name__} is FSDP1, which is not supported; give fsdp, which is FSDP2")
    return FSDP2Strategy(cpu_offload=_OFFLOADS[given]) if given in _OFFLOADS else given


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2; it splits the model, by its decoder blocks, over all devices of all nodes.

    Checkpoints hold tensors by name, so that every strategy and every number of processes can resume from them.

    Args:
        save_distributed_checkpoint: Write a checkpoint as a folder to which each process writes its part. False gathers whole
            tensors on the first process and writes one file.
        cpu_offload: Keep each device's part of weights, gradients and optimizer state in the memory of the host. Weights are
            copied to the device one block at a time, gradients are copied back, and the optimizer step runs on the host.
        process_group_backend: Backend such as `nccl` or `gloo`; None chooses it by the device.
        timeout: How long a process waits for the others before it gives up.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = False,
        cpu_offload: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.writes_folders = save_distributed_checkpoint
        self.cpu_offload = cpu_offload

    @property
    def module(self) -> LightningModule:
        """The module being trained, available once the Trainer has set the strategy up."""
        module = self.lightning_module
        assert module is not None
        return module

    @property
    def offloads(self) -> bool:
        """Whether weights are kept on another device than the computing device."""
        return self.cpu_offload and self.root_device.type != "cpu"

    def setup_environment(self) -> None:
        """Join the other processes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        group = torch.distributed.group.WORLD
        if self.offloads and group is not None:
            # Subgroups of a group that is bound to a device work only for that device (before torch 2.9 they cannot be made).
            group.bound_device_id = None

    def _get_process_group_backend(self) -> str:
        backend = super()._get_process_group_backend()
        if not self.offloads or "cpu:" in backend:
            return backend
        # Gradient norms and checkpoints are gathered on the CPU.
        return f"cpu:gloo,{backend if ':' in backend else f'{self.root_device.type}:{backend}'}"

    def model_to_device(self) -> None:
        """Move tensors that are not split, such as metrics, to the device; with offloading the parts stay on the host."""
        assert self.model is not None
        if not self.cpu_offload:
            super().model_to_device()
            return
        for module in self.model.modules():
            if isinstance(module, Metric):
                module.to(self.root_device)

    def shard(self, model: nn.Module) -> nn.Module:
        """Split a model that every rank holds in full; a model that is already split stays unchanged."""
        if isinstance(model, FSDPModule):
            return model
        mesh = self.device_mesh["data_parallel"]
        send_trained_weights(model, self.root_device)
        # Pinned memory only helps copies to an accelerator.
        policy = CPUOffloadPolicy(pin_memory=self.offloads) if self.cpu_offload else OffloadPolicy()
        for block in decoder_blocks(model):
            fully_shard(block, mesh=mesh, offload_policy=policy)
        fully_shard(model, mesh=mesh, offload_policy=policy)
        return model

    # ---- checkpoints

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning should call `load_optimizer_state_dict`."""
        return True

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None) -> None:
        """Write a folder on all ranks together, or a file on the first rank."""
        if not self.writes_folders:
            Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)
            return
        if storage_options is not None:
            raise ConfigError("storage_options does not work with sharded checkpoints, which are folders; leave it out")
        write_folder(checkpoint, Path(self.broadcast(filepath)))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a whole file on every rank, or from a folder the parts that this rank needs."""
        if not Path(checkpoint_path).is_dir():
            return Strategy.load_checkpoint(self, checkpoint_path, weights_only)
        parts = {name: parameter.detach() for name, parameter in self.module.named_parameters()}

        def target(keys: tuple[str, ...], size: torch.Size, dtype: torch.dtype) -> Tensor | None:
            if keys[0] != "state_dict" and not self.optimizers:
                return None
            part = parts.get(keys[1] if keys[0] == "state_dict" else keys[2])
            if part is None or part.shape != size:  # a counter of the optimizer, or something that will be refused
                return torch.empty(size, dtype=dtype)
            return torch.empty_like(part, dtype=dtype)

        return read_folder(Path(checkpoint_path), target, together=True)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights for a checkpoint: the parts of this rank for a folder, else whole tensors on rank 0.

        Frozen weights are left out if the module does not load strictly.
        """
        module = self.module
        names = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
        left_out = set() if module.strict_loading else names
        return {name: self._as_saved(value) for name, value in module.state_dict().items() if name not in left_out}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer state for a checkpoint: the parts of this rank for a folder, else whole tensors on rank 0."""
        state = plain_optimizer(optimizer).state_dict()
        saved = {number: {key: self._as_saved(value) for key, value in entry.items()} for number, entry in state["state"].items()}
        return {**state, "state": saved}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load this rank's part of each weight."""
        parameters = dict(self.module.named_parameters())
        state = {
            name: _part_of(value, parameters[name]) if name in parameters else value
            for name, value in checkpoint["state_dict"].items()
        }
        self.module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this rank's part of the optimizer state.

        Raises:
            CheckpointError: If the state belongs to other parameters.
        """
        names = parameter_names(self.module)
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            check_names(saved, optimizer, names)
            parts: dict[str, dict[str, Any]] = {}
            for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
                entry = saved["state"].get(names[parameter], {})
                parts[names[parameter]] = {
                    key: _part_of(value, parameter) if is_split_like(parameter, value) else value for key, value in entry.items()
                }
            optimizer.load_state_dict({**saved, "state": parts})

    def _as_saved(self, value: Any) -> Any:
        if self.writes_folders:
            return value.detach() if isinstance(value, Tensor) else value
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if not isinstance(value, Tensor):
            return value
        return value.detach().cpu() if self.is_global_zero else torch.empty(0)


def _part_of(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """This rank's part of a tensor, split like its parameter; a tensor that is already this part is returned as it is."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    # src_data_rank=None: every rank has read the whole tensor, so no tensor has to be sent.
    whole = value.to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
