import pytest
import torch
from rounding import additions_of, assert_same_sums
from test_fused_lora import build as build_adapted
from tiny_decoders import ALL

from hybrid_lightning.runner import prepacked as constant
from hybrid_lightning.runner.backend import Backend
from hybrid_lightning.runner.fused_lora import use_fused_lora
from hybrid_lightning.runner.prepacked import prepacked_weights


def build(*family_and_targets, **settings):
    model = build_adapted(*family_and_targets, **settings)
    use_fused_lora(model, Backend())
    return model


def logits_of(model, autocast=False):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return model(torch.arange(5, 25).repeat(4, 1)).logits.float()


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_prepacked_weights_give_the_same_and_leave_no_trace(autocast, copies, monkeypatch):
    """Accelerators copy no weight that has the dtype of the products."""
    monkeypatch.setattr(Backend, "copies_pay", lambda *_: copies)
    model = build()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    held = {parameter.data_ptr() for parameter in model.parameters()}
    expected, exact = logits_of(model, autocast), logits_of(model)
    with prepacked_weights(model, Backend(), torch.bfloat16 if autocast else None):
        # Sums are rounded elsewhere in bfloat16, but no worse.
        off = (logits_of(model, autocast) - exact).abs().mean()
        assert off <= (1.1 * (expected - exact).abs().mean() if autocast else 1e-6)
        found = [constant.product_factors(module) for module in model.modules() if isinstance(module, constant.FusedLora)]
        assert len(found) == 4
        assert copies or all((factors.weight.data_ptr() in held) is not autocast for factors in found)
        model(torch.arange(5, 25).view(2, 10)).logits.square().mean().backward()
        assert any(p.grad is not None for p in model.parameters()), "a pass with gradients takes the weights themselves"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def same_inputs(model):
    for layer in model.base_model.model.model.layers:
        attention = layer.self_attn
        yield [attention.q_proj, attention.k_proj, attention.v_proj]
        yield [layer.mlp.gate_proj, layer.mlp.up_proj]


@pytest.mark.parametrize(
    ("family", "targets", "autocast"),  # q, k and v of qwen2 have a bias
    [
        ("qwen2", ALL, False),
        ("llama", ALL, True),
        ("qwen2", ("q_proj", "v_proj", "up_proj"), True),
        ("llama", ("k_proj", "gate_proj", "up_proj"), False),
    ],
)
@pytest.mark.usefixtures("with_and_without_kernels")
def test_layers_with_one_input_are_one_product(family, targets, autocast, monkeypatch):
    model = build(family, targets, rank_pattern={"k_proj": 5}, alpha_pattern={"v_proj": 1})
    expected, exact = logits_of(model, autocast), logits_of(model)
    made = []
    original = Backend.prepacked_product
    monkeypatch.setattr(Backend, "prepacked_product", lambda self, weight: made.append(weight.shape) or original(self, weight))
    with prepacked_weights(model, Backend(), torch.bfloat16 if autocast else None, same_inputs(model)):
        if autocast:  # sums are rounded elsewhere, but no worse
            assert (logits_of(model, True) - exact).abs().mean() <= 1.1 * (expected - exact).abs().mean()
        else:
            assert_same_sums(logits_of(model), expected, additions_of(model, 20))
    joined = {"k_proj": 3, "q_proj": 3, "v_proj": 3, "gate_proj": 2, "up_proj": 2}
    groups = {joined.get(name, name) for name in targets}
    layers = 2 * len(groups)
    by_products = autocast and constant.kernels.library() is None
    assert len(made) == (2 * layers if by_products else layers), "one of a group, and one with A where no kernel makes that"
