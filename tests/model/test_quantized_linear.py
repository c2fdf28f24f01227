"""The layer computes what a plain layer with the unpacked weight computes, in value and gradient, in every mode."""

import pytest
import torch
from rounding import assert_same_sums
from torch import nn

pytest.importorskip("bitsandbytes")

from bitsandbytes.functional import dequantize_4bit

from hybrid_lightning.model.quantized_linear import NF4Linear


def build(dtype=torch.float32, bias=True, shape=(96, 128)):
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype).requires_grad_(False)
    linear.weight.normal_()
    return linear, NF4Linear(linear.weight, linear.bias, torch.device("cpu")).eval()


def unpacked(layer):
    return dequantize_4bit(layer.weight.data, layer.quant_state)


def inputs(dtype=torch.float32, rows=(2, 5), width=128):
    return torch.randn(*rows, width, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_heeded(dtype):
    linear, layer = build(dtype)
    x, y = inputs(dtype), inputs(dtype)
    plain = nn.Linear(128, 96).requires_grad_(False)
    plain.weight.copy_(unpacked(layer))
    plain.bias.copy_(linear.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, expected = layer(x), plain(y)
    assert result.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected, rtol=0.02, atol=0.1)
    result.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad, y.grad, rtol=0.03, atol=0.03 * float(y.grad.abs().max()))


def test_nothing_around_a_layer_changes_it_nor_a_row_the_others_and_making_it_draws_no_random_number():
    """In eval mode, as the base is while it is trained; on some CPUs bitsandbytes' own layer would lose the gradient."""
    _, layer = build()
    packed = layer.weight.data.clone()
    with torch.no_grad():
        first = layer(inputs())
    x = inputs()
    result = layer(x)
    assert torch.equal(result, first) and torch.equal(layer.weight.data, packed)
    result.square().sum().backward()
    assert_same_sums(x.grad, 2 * first @ unpacked(layer), additions=96 + 128)
    x = inputs(rows=(6,)).detach()
    x[3] *= 1000
    alone = [layer(row[None])[0] for row in x]  # a list: each is as exact as its own size allows
    assert_same_sums(list(layer(x)), alone, additions=128)
    torch.manual_seed(3)
    linear, layer = build()
    state = torch.get_rng_state()
    NF4Linear(linear.weight, linear.bias, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    expected = layer(inputs())
    moved = nn.Sequential(layer).to("cpu", torch.bfloat16).to(torch.float32)  # dtypes are of what floats: the bias
    torch.testing.assert_close(moved(inputs()), expected, rtol=0.01, atol=0.01)
    assert layer.weight.element_size() == 1
