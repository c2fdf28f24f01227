"""bfloat16 weights are trained as float32 ones: no step is rounded off, and nothing is lost in a checkpoint."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import hybrid_lightning.model.master_weights as module
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.model.master_weights import MASTER, MasterWeights
from hybrid_lightning.training.optim import make_optimizer

OPTIMIZERS = {
    "adamw": functools.partial(torch.optim.AdamW, weight_decay=0.1),
    "fused": functools.partial(torch.optim.AdamW, fused=True),
    "momentum": functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "sgd": torch.optim.SGD,
}
SHAPES = {"full": [(7, 5), (3,)], "lora": [(4, 6)]}


def weights(dtype, scale=0.05):
    draw = torch.Generator().manual_seed(0)
    made = {n: [torch.randn(shape, generator=draw) * scale for shape in shapes] for n, shapes in SHAPES.items()}
    return {n: [nn.Parameter(value.bfloat16().to(dtype)) for value in values] for n, values in made.items()}


def build(optimizer, dtype, lr=1e-3):
    made = weights(dtype)
    groups = [{"params": made["full"], "lr": lr, "name": "full"}, {"params": made["lora"], "lr": 10 * lr, "name": "lora"}]
    return make_optimizer(optimizer, groups), [*made["full"], *made["lora"]]


def steps(optimizer, parameters, count, first=0, scale=1.0):
    """Make steps with gradients that bfloat16 can hold, the same for every optimizer."""
    for number in range(first, first + count):
        draw = torch.Generator().manual_seed(100 + number)
        for parameter in parameters:
            gradient = (torch.randn(parameter.shape, generator=draw) * scale).bfloat16()
            parameter.grad = gradient.to(parameter.dtype)
        for group in optimizer.param_groups:
            group["lr"] *= 0.9  # as a schedule does
        optimizer.step()


def masters(optimizer):
    state = optimizer.state_dict()["state"]
    return [state[number][MASTER] for number in range(len(state))]


@pytest.mark.parametrize(("name", "chunk"), [*((name, 10) for name in OPTIMIZERS), ("adamw", 2**24)])
def test_the_weights_are_those_of_float32_training_also_from_a_state_that_was_saved(name, chunk, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    exact, expected = build(OPTIMIZERS[name], torch.float32)
    split, found = build(OPTIMIZERS[name], torch.bfloat16)
    assert isinstance(split, MasterWeights) and not isinstance(exact, MasterWeights)
    for number in range(5):
        steps(exact, expected, 1, number)
        steps(split, found, 1, number)
        assert all(torch.equal(*pair) for pair in zip(masters(split), expected, strict=True))
        for high, value in zip(found, expected, strict=True):
            assert high.dtype == torch.bfloat16
            # Between two bfloat16 numbers either is nearest.
            torch.testing.assert_close((high.float() - value).abs(), (value.bfloat16().float() - value).abs(), rtol=0, atol=0)
    torch.save(split.state_dict(), tmp_path / "state.pt")
    again, parameters = build(OPTIMIZERS[name], torch.bfloat16)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(torch.equal(*pair) for pair in zip(parameters, found, strict=True)), "the weights come with the state"
    steps(exact, expected, 3, 5)
    steps(again, parameters, 3, 5)
    assert all(torch.equal(*pair) for pair in zip(masters(again), expected, strict=True))
    assert [group["lr"] for group in again.param_groups] == [group["lr"] for group in exact.param_groups]


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1), st.lists(st.integers(-(2**15), 2**15 - 1), max_size=5))
def test_every_number_is_its_two_halves(bits, between):
    ties = [high * 2**16 + 2**15 for high in between]
    value = torch.tensor([*bits, *ties], dtype=torch.int64).to(torch.int32).view(torch.float32)
    value = value[~value.isnan()]
    high = torch.empty_like(value, dtype=torch.bfloat16)
    low = module._split(value.clone(), high, None)
    assert low.dtype == torch.int16
    assert torch.equal(high.view(torch.int16), value.bfloat16().view(torch.int16)), "rounded as autocast does"
    exact, rounded = value.view(torch.int32), high.view(torch.int16).to(torch.int32) * 2**16
    down = (exact - rounded == 2**15).int()  # from just between two numbers
    assert torch.equal(module._join(high, low).view(torch.int32), exact - down)
    high = torch.zeros(1, dtype=torch.bfloat16)
    low = module._split(torch.tensor([float("nan")]), high, None)
    assert high.isnan().all() and module._join(high, low).isnan().all(), "what is not a number stays so"


def test_a_weight_without_gradient_is_left_alone_and_two_bytes_are_kept_beside_the_moments():
    optimizer, parameters = build(torch.optim.AdamW, torch.bfloat16)
    before = parameters[1].detach().clone()
    for parameter in (parameters[0], parameters[2]):
        parameter.grad = torch.ones_like(parameter)
    loss = optimizer.step(lambda: 0.25)
    assert loss == 0.25 and torch.equal(parameters[1], before) and parameters[1] not in optimizer.state
    assert optimizer.state_dict()["state"].keys() == {0, 2}
    optimizer, parameters = build(torch.optim.AdamW, torch.bfloat16)
    steps(optimizer, parameters, 2)
    assert kept(optimizer) == 2 + 8
    assert not optimizer._inner.state and not any(group["params"] for group in optimizer._inner.param_groups)


class Counting(torch.optim.SGD):
    """Keeps a count that all of a group share."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1


def test_an_optimizer_with_a_state_of_groups_is_refused_at_the_first_step():
    optimizer, parameters = build(Counting, torch.bfloat16)
    with pytest.raises(ConfigError, match=r"optimizer=Counting keeps a state of whole groups.*use torch\.optim\.AdamW"):
        steps(optimizer, parameters, 1)


def kept(optimizer):
    """Bytes of state for each number of the first weight, its counter aside."""
    weight = optimizer.param_groups[0]["params"][0]
    tensors = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor) and value.dim()]
    return sum(value.untyped_storage().nbytes() for value in tensors) / weight.numel()


def test_moments_of_eight_bits():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = nn.Parameter(torch.full((64, 128), 0.05, dtype=torch.bfloat16))
    optimizer = make_optimizer(bitsandbytes.optim.AdamW8bit, [{"params": [weight], "lr": 1e-6, "name": "full"}])
    for _ in range(3):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert 4 <= kept(optimizer) < 4.3
    (master,) = masters(optimizer)
    assert torch.equal(weight, torch.full_like(weight, 0.05)) and ((weight - master) > 1e-6).all()
