import contextlib
import copy

import pytest
import torch
from kernel_numbers import kept
from peft import LoraConfig, get_peft_model
from rounding import assert_same_sums
from tiny_models import build_model
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from hybrid_lightning.runner import Backend, fused_layers, use_fused_layers
from hybrid_lightning.runner.fused_layers import FusedMLP, FusedRMSNorm
from hybrid_lightning.runner.fused_lora import made_like, use_fused_lora

pytestmark = pytest.mark.usefixtures("with_and_without_kernels")


def frozen(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return layer.requires_grad_(False)


def fused_like(layer):
    """A copy of a layer, fused; a model holds it."""
    model = torch.nn.Sequential(copy.deepcopy(layer))
    use_fused_layers(model, Backend())
    return model[0]


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
def test_values_and_gradients_equal_transformers(kind, dtype):
    plain = frozen(layers()[kind].to(dtype))
    fused = fused_like(plain)
    assert type(fused) is (FusedRMSNorm if kind == "norm" else FusedMLP)
    x, gradient = torch.randn(2, 5, 32, dtype=dtype) * 3, torch.randn(2, 5, 32, dtype=dtype)
    value, slope = result_and_gradient(plain, x, gradient)
    mine, my_slope = result_and_gradient(fused, x, gradient)
    torch.testing.assert_close(mine, value, atol=0, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), value, atol=0, rtol=0)
    if dtype == torch.bfloat16:  # no further from the exact gradient than theirs
        exact = result_and_gradient(copy.deepcopy(plain).double(), x.double(), gradient.double())[1]
        assert (my_slope.double() - exact).norm() <= 1.05 * (slope.double() - exact).norm()
    else:
        of_sums = torch.float32 if kind == "norm" else dtype  # whatever its input is
        assert_same_sums(my_slope.to(of_sums), slope.to(of_sums), additions=2 * (32 + 32 + 48))


def adapted(bias=False, **options):
    """A gated MLP with LoRA on all three layers, by PEFT alone and with ours; of 32 inputs and 48 within."""
    config = copy.deepcopy(build_model("llama").config)
    config.mlp_bias = bias
    mlp = frozen(LlamaMLP(config))
    torch.manual_seed(1)
    names = ["gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(mlp, LoraConfig(r=4, lora_alpha=6, target_modules=names, init_lora_weights=False, **options))
    fast = copy.deepcopy(model)
    use_fused_lora(fast, backend := Backend())
    use_fused_layers(fast, backend)
    return model, fast


def slopes_of(model, x, gradient):
    value, slope = result_and_gradient(model, x, gradient)
    slopes = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(slopes) == 6 and all(part is not None for part in slopes.values())
    return {"value": value, "x": slope, **slopes}


def test_a_gated_mlp_with_lora_has_the_values_and_gradients_of_peft():
    plain, fused = adapted(bias=True)
    x, gradient = (torch.randn(2, 7, 32) for _ in range(2))
    singles = [slopes_of(model, x, gradient) for model in (fused, plain)]
    for model in (fused, plain):
        model.double().zero_grad()
    ours, theirs = (slopes_of(model, x.double(), gradient.double()) for model in (fused, plain))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    for name, exact in theirs.items():  # in float32 no further from them than PEFT is
        mine, other = (float((part[name].double() - exact).norm()) for part in singles)
        assert mine <= 1.1 * other + 1e-6 * float(exact.norm())


def test_whoever_watches_a_layer_sees_it_called_and_bfloat16_rounds_as_its_layers_do():
    _, fused = adapted()
    x = torch.randn(3, 32)
    expected = fused(x)
    seen = []
    fused.base_model.model.down_proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.testing.assert_close(fused(x), expected, atol=0, rtol=0)
    assert len(seen) == 1 and seen[0].shape == expected.shape
    model = adapted()[1].bfloat16()
    layers = copy.deepcopy(model)
    layers.base_model.model.down_proj.register_forward_hook(lambda *_: None)  # so that it is called
    x, gradient = (torch.randn(2, 7, 32, dtype=torch.bfloat16) for _ in range(2))
    torch.testing.assert_close(slopes_of(model, x, gradient), slopes_of(layers, x, gradient), atol=0, rtol=0)


@pytest.mark.parametrize("change", ["dropout", "dora", "disabled", "unfrozen"])
def test_what_is_not_plain_lora_is_left_to_peft(change):
    options = {"dropout": {"lora_dropout": 0.5}, "dora": {"use_dora": True}}.get(change, {})
    plain, fused = adapted(**options)
    x, gradient = torch.randn(5, 32), torch.randn(5, 32)
    found = []
    for model in (fused, plain):
        if change == "unfrozen":
            model.base_model.model.down_proj.base_layer.weight.requires_grad_()
        torch.manual_seed(0)
        with model.disable_adapter() if change == "disabled" else contextlib.nullcontext():
            results = result_and_gradient(model, x, gradient)
        found.append([*results, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)])
    assert_same_sums(*found, additions=2 * (32 + 32 + 48))


def test_less_is_kept():
    x = torch.randn(1000, 32, requires_grad=True)
    assert kept(adapted()[1], x) <= 1000 * (32 + 2 * 48 + 3 * 4) * 4, "a gated MLP with LoRA does not keep the product"
    for kind, share in (("norm", 0.55), ("mlp", 0.8)):
        plain, x = frozen(layers()[kind].bfloat16()), torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
        assert kept(fused_like(plain), x) <= share * kept(plain, x)


def test_a_norm_that_is_trained_gets_its_gradient_and_one_that_somebody_watches_stays_what_it_is():
    norm = fused_like(LlamaRMSNorm(8))
    norm(torch.randn(3, 8)).square().sum().backward()
    assert norm.weight.grad is not None
    norm = LlamaRMSNorm(8)
    norm.register_forward_hook(lambda *_: None)
    assert type(fused_like(norm)) is LlamaRMSNorm


@pytest.mark.parametrize(("family", "known"), [("llama", True), ("qwen3", True), ("gemma", False), ("gpt2", False)])
def test_only_layers_that_compute_the_same_are_replaced_and_finding_out_draws_no_number(family, known):
    """The adapter's weights are drawn next from the global generator, so its state must not change."""
    model = build_model(family).eval()
    ids = torch.arange(5, 15)[None]
    names = list(model.state_dict())
    expected = model(ids).logits.detach()
    fused_layers._mlp_is_llamas.cache_clear()
    fused_layers._norm_is_llamas.cache_clear()
    before = torch.get_rng_state()
    use_fused_layers(model, Backend())
    assert torch.equal(torch.get_rng_state(), before)
    kinds = {type(module) for module in model.modules()}
    assert (FusedRMSNorm in kinds, FusedMLP in kinds) == (known, known)
    torch.testing.assert_close(model(ids).logits.detach(), expected, atol=0, rtol=0)
    assert list(model.state_dict()) == names


def reformatted(self, hidden_states):
    dtype, x = hidden_states.dtype, hidden_states.float()
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(dtype)


def rounded_later(self, hidden_states):
    x = hidden_states.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return (self.weight.float() * x).to(hidden_states.dtype)


@pytest.mark.parametrize(
    ("kind", "forward", "known"),
    [
        *(("norm", reformatted, True), ("norm", rounded_later, False)),
        ("norm", lambda self, x, residual: reformatted(self, x) + residual, False),
        ("mlp", lambda self, x: self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x))), True),
        ("mlp", lambda self, x: self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x)), False),
    ],
    ids=["reformatted", "rounded later", "wants more", "gated", "gated the other way"],
)
def test_a_layer_is_known_by_what_it_computes_and_not_by_its_text(kind, forward, known):
    """The layer's class is one that transformers might have in another file."""
    plain = layers()[kind].requires_grad_(False)
    methods = {"forward": forward, "__module__": "transformers.models.other.modeling_other"}
    layer = made_like(plain, type(f"Other{type(plain).__name__}", (torch.nn.Module,), methods))
    assert isinstance(fused_like(layer), FusedRMSNorm if kind == "norm" else FusedMLP) is known
