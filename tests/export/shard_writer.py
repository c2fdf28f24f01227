"""Runs in processes of its own."""

from pathlib import Path

from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from hybrid_lightning.sharding.sharded_folder import write_folder


def write_shard(rank: int, folder: str, content: dict) -> None:
    """Write one of two shards, as FSDP2 does."""
    distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}.store")
    mesh = init_device_mesh("cpu", (2,))
    shards = {name: distribute_tensor(weight, mesh, [Shard(0)]) for name, weight in content["state_dict"].items()}
    write_folder({**content, "state_dict": shards}, Path(folder))
    distributed.destroy_process_group()
