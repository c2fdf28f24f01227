import copy

import pytest
import torch
from tiny_models import build_model
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from hybrid_lightning.adapters.lean_layers import LeanMLP, LeanRMSNorm, use_lean_layers


def frozen(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return layer.requires_grad_(False)


def result_and_gradient(layer, x, gradient):
    x = x.clone().requires_grad_()
    result = layer(x)
    result.backward(gradient)
    return result.detach(), x.grad


def layers():
    torch.manual_seed(0)
    config = build_model("llama").config
    return {"norm": LlamaRMSNorm(config.hidden_size), "mlp": LlamaMLP(config)}


@pytest.mark.parametrize("kind", ["norm", "mlp"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_transformers(kind, dtype):
    plain = frozen(layers()[kind].to(dtype))
    lean = copy.deepcopy(plain)
    use_lean_layers(lean)
    assert type(lean) is (LeanRMSNorm if kind == "norm" else LeanMLP)
    size = plain.weight.shape[0] if kind == "norm" else plain.hidden_size
    x, gradient = torch.randn(2, 5, size, dtype=dtype) * 3, torch.randn(2, 5, size, dtype=dtype)
    value, slope = result_and_gradient(plain, x, gradient)
    mine, my_slope = result_and_gradient(lean, x, gradient)
    torch.testing.assert_close(mine, value, atol=0, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(lean(x), value, atol=0, rtol=0)
    if dtype == torch.bfloat16:  # no further from the exact gradient than theirs
        exact = result_and_gradient(copy.deepcopy(plain).double(), x.double(), gradient.double())[1]
        assert (my_slope.double() - exact).norm() <= 1.05 * (slope.double() - exact).norm()
    else:
        torch.testing.assert_close(my_slope, slope, atol=1e-6, rtol=1e-5)


def test_less_is_kept():
    def kept(layer, x):
        tensors = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.setdefault(t.data_ptr(), t), lambda t: t):
            layer(x)
        held = {parameter.data_ptr() for parameter in layer.parameters()}
        return sum(t.nbytes for pointer, t in tensors.items() if pointer not in held)

    for kind, share in (("norm", 0.55), ("mlp", 0.8)):
        plain = frozen(layers()[kind].bfloat16())
        lean = copy.deepcopy(plain)
        use_lean_layers(lean)
        size = plain.weight.shape[0] if kind == "norm" else plain.hidden_size
        x = torch.randn(64, size, dtype=torch.bfloat16, requires_grad=True)
        assert kept(lean, x) <= share * kept(plain, x)


def test_a_norm_that_is_trained_gets_its_gradient():
    norm = LlamaRMSNorm(8)
    use_lean_layers(norm)
    norm(torch.randn(3, 8)).square().sum().backward()
    assert norm.weight.grad is not None


@pytest.mark.parametrize(
    ("family", "norms", "mlps"), [("llama", True, True), ("qwen3", True, True), ("gemma", False, False), ("gpt2", False, False)]
)
def test_only_layers_that_compute_the_same_are_replaced(family, norms, mlps):
    model = build_model(family).eval()
    ids = torch.arange(5, 15)[None]
    names = list(model.state_dict())
    expected = model(ids).logits.detach()
    use_lean_layers(model)
    kinds = {type(module) for module in model.modules()}
    assert (LeanRMSNorm in kinds, LeanMLP in kinds) == (norms, mlps)
    torch.testing.assert_close(model(ids).logits.detach(), expected, atol=0, rtol=0)
    assert list(model.state_dict()) == names
