"""Computing with a model of FSDP1 by other ways than its forward pass, in a process group of one."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from hybrid_lightning.sharding.weights import Weights, split_by_fsdp1, weights_of


class Model(nn.Module):
    """Blocks in a list, and a layer outside of them."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 3)
        self.calls = 0

    def forward(self, x, scale=1.0):
        self.calls += 1
        for block in self.blocks:
            x = block(x).tanh()
        return scale * self.head(x)


@pytest.fixture
def models(tmp_path):
    """A model as it is, and the same split."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        plain, model = Model(), Model()
        model.load_state_dict(plain.state_dict())
        options = {"device_id": torch.device("cpu"), "device_mesh": init_device_mesh("cpu", (1,)), "use_orig_params": True}
        yield plain, split_by_fsdp1(model, list(model.blocks), **options)
    finally:
        distributed.destroy_process_group()


def test_a_function_is_computed_in_the_place_of_the_forward_pass(models):
    plain, split = models
    weights, x = weights_of(split), torch.randn(2, 4)

    def by_parts():
        for block in split.blocks:  # attributes are those of the model
            hidden = block(x)
        again = weights.as_forward(lambda: split.head(hidden))  # the weights are there already
        return again, split.module(x)

    results = weights.as_forward(by_parts)
    hidden = plain.blocks[1](x)
    assert weights.sharded and split.calls == 1
    for found, expected in zip(results, (plain.head(hidden), plain(x)), strict=True):
        assert torch.equal(found, expected)
    sum(part.sum() for part in results).backward()
    expected = torch.autograd.grad(plain.head(hidden).sum() + plain(x).sum(), list(plain.parameters()))
    for one, other in zip(split.parameters(), expected, strict=True):
        torch.testing.assert_close(one.grad.view_as(other), other)


def test_units_can_be_called_while_all_weights_are_gathered(models):
    plain, split = models
    weights, x = weights_of(split), torch.randn(2, 4)
    with torch.no_grad():
        found = weights.gathered(lambda: (split(x), split.blocks[0](x), weights.as_forward(lambda: split.head(x))))
    assert all(map(torch.equal, found, (plain(x), plain.blocks[0](x), plain.head(x))))
    assert torch.equal(split(x), plain(x)), "afterwards it gathers by itself again"
    with torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            weights.gathered(lambda: 1 / 0)
        assert torch.equal(weights.gathered(lambda: split(x)), plain(x)), "after an error, too"


def test_a_whole_model_needs_nothing():
    model = Model()
    assert type(weights_of(model)) is Weights and not weights_of(model).sharded
    assert weights_of(model).as_forward(lambda: 3) == weights_of(model).gathered(lambda: 3) == 3
