"""Runs in processes of its own, which import nothing but torch."""

from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def write_shard(rank: int, folder: str, state: dict) -> None:
    """Write one of two shards, as FSDP2 does."""
    distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}.store")
    mesh = init_device_mesh("cpu", (2,))
    shards = {name: distribute_tensor(weight, mesh, [Shard(0)]) for name, weight in state.items()}
    checkpoint.save({"state_dict": shards}, checkpoint_id=folder)
    distributed.destroy_process_group()
