"""A model of FSDP1 while all of its weights are gathered, in a process group of one; in runs: `test_equal_to_one_process`."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from hybrid_lightning.sharding.weights import split_by_fsdp1, weights_of


class Model(nn.Module):
    """Blocks in a list, and a layer outside of them."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x).tanh()
        return self.head(x)


@torch.no_grad()
def test_units_can_be_called_while_all_weights_are_gathered(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        plain, model, x = Model(), Model(), torch.randn(2, 4)
        model.load_state_dict(plain.state_dict())
        options = {"device_id": torch.device("cpu"), "device_mesh": init_device_mesh("cpu", (1,)), "use_orig_params": True}
        split = split_by_fsdp1(model, list(model.blocks), **options)
        weights = weights_of(split)
        found = weights.gathered(lambda: (split(x), split.blocks[0](x), weights.as_forward(lambda: split.head(x))))
        assert weights.sharded and all(map(torch.equal, found, (plain(x), plain.blocks[0](x), plain.head(x))))
        with torch.enable_grad():
            assert torch.equal(split(x), plain(x)), "afterwards it gathers by itself again"
        with pytest.raises(ZeroDivisionError):
            weights.gathered(lambda: 1 / 0)
        assert torch.equal(weights.gathered(lambda: split(x)), plain(x)), "after an error, too"
    finally:
        distributed.destroy_process_group()
