import pytest
import torch
from kernel_numbers import kept
from peft import LoraConfig, get_peft_model
from rounding import additions_of, assert_same_sums
from tiny_models import build_model

from hybrid_lightning.runner import Backend, fused_lora, use_fused_layers
from hybrid_lightning.runner.cpu import operators as low_rank
from hybrid_lightning.runner.cpu.build import library
from hybrid_lightning.runner.cpu.operators import add_low_rank
from hybrid_lightning.runner.fused_lora import FusedLora, use_fused_lora

BACKEND = Backend()  # of all models of this file


def build(family="llama", targets=("q_proj", "down_proj"), **settings):
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=list(targets), **settings)
    model = get_peft_model(build_model(family), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def run(model, autocast=False, fused=False):
    ids = torch.arange(5, 25).view(2, 10)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), BACKEND.in_pass(fused):
        logits = model(ids).logits
    logits.float().square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logits.detach(), gradients


def assert_same(model, found, expected):
    """Logits, and gradients, which are sums over all 20 tokens."""
    assert_same_sums(found[0], expected[0], additions_of(model, 10))
    assert_same_sums(found[1], expected[1], additions_of(model, 20, backward=True))


@pytest.mark.parametrize(("family", "settings"), [("llama", {"use_rslora": True}), ("qwen2", {})])
def test_values_and_gradients_are_pefts_by_products_and_by_kernels(family, settings, monkeypatch):
    model, called = build(family, **settings), []
    monkeypatch.setattr(fused_lora, "add_low_rank", lambda *args: called.append(args) or add_low_rank(*args))
    expected = run(model)
    use_fused_lora(model, BACKEND)
    layers = [module for module in model.modules() if type(module) is FusedLora]
    found = run(model)
    assert_same(model, found, expected)
    assert len(layers) == 4 and not called and all(gradient.dtype == torch.float32 for gradient in found[1].values())
    layers[-1].scaling["default"] *= 1.001  # a fault is far beyond rounding
    for part in (0, 1):
        with pytest.raises(AssertionError, match="not close"):
            assert_same_sums(run(model)[part], expected[part], additions_of(model, 20, backward=True))
    layers[-1].scaling["default"] /= 1.001
    if library() is None:
        return
    use_fused_layers(model, BACKEND)
    assert_same(model, run(model, fused=True), expected)
    assert len(called) == 4
    run(model, autocast=True, fused=True)
    assert len(called) == 4, "in bfloat16 processors have faster products of their own"
    monkeypatch.setattr(low_rank, "_MOST", 1)
    assert_same(model, run(model, fused=True), expected)
    assert len(called) == 4, "wide factors are multiplied by libraries"


def test_mixed_precision_is_as_close_to_float32_as_pefts_and_no_copies_of_full_size_are_kept():
    model = build()
    exact, theirs = run(model), run(model, autocast=True)
    use_fused_lora(model, BACKEND)
    ours = run(model, autocast=True)

    def error(result):
        of_gradients = [(result[1][name] - exact[1][name]).norm() / exact[1][name].norm() for name in exact[1]]
        return float((result[0].float() - exact[0]).norm() / exact[0].norm()), float(sum(of_gradients))

    assert ours[0].dtype == torch.bfloat16
    assert all(mine <= 1.2 * other for mine, other in zip(error(ours), error(theirs), strict=True))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert kept(layer, torch.randn(100, 32, requires_grad=True)) == 4 * 100 * (32 + 3), "its input and x A'"
