"""Weights of real adapted models, counted without them."""

import pytest
import torch
from tiny_models import FAMILIES, build_model

from hybrid_lightning.adapters import LoraSettings, ModuleBudget, ParameterBudget, apply_plan, find_candidates
from hybrid_lightning.adapters.budgets import plan_of_budget
from hybrid_lightning.memory import RunSettings
from hybrid_lightning.memory.sizes import measure_sizes
from hybrid_lightning.policy import NF4, Int8
from hybrid_lightning.policy.quantization import quantize_base
from hybrid_lightning.sharding.parameters import decoder_blocks

LORA, MIXED = LoraSettings(rank=4), {"mlp": 3, "attention": 0}


def held(model):
    return sum(parameter.nbytes for parameter in model.parameters())


def settings_of(model, **arguments):
    return RunSettings(model.config, 4, 4, dtype=next(model.parameters()).dtype, lora=LORA, **arguments)


# Shares, whether start weights are kept, dtypes and ranks, pairwise.
SHARES = [(0.0, True, torch.float32, MIXED), (0.3, False, torch.bfloat16, {})]
SHARES += [(0.3, True, torch.bfloat16, MIXED), (1.0, False, torch.float32, {})]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("share", "keep", "dtype", "ranks"), SHARES)
def test_weights_are_those_of_the_adapted_model(family, share, keep, dtype, ranks):
    model = build_model(family).to(dtype)
    plan = plan_of_budget(find_candidates(model), ModuleBudget(share), LORA, ranks)
    sizes = measure_sizes(settings_of(model, keep_start_weights=keep), plan)
    assert sizes.parameters == sum(parameter.numel() for parameter in model.parameters())
    block = max(sum(p.nbytes for p in b.parameters()) for b in decoder_blocks(model))
    adapted = apply_plan(model, plan, keep)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert sizes.weight_bytes == held(adapted)
    assert (sizes.trainable, sizes.trained_bytes) == (sum(p.numel() for p in trained), sum(p.nbytes for p in trained))
    blocks = decoder_blocks(adapted)
    assert sizes.block_bytes == max(sum(p.nbytes for p in b.parameters()) for b in blocks) and block > 0
    assert sizes.outside_bytes == held(adapted) - sum(p.nbytes for b in blocks for p in b.parameters())
    assert sizes.share_full == pytest.approx(sum(m.parameters for m in plan.candidates if m.mode == "full") / sizes.candidates)


@pytest.mark.parametrize("kind", [NF4, Int8])
def test_a_quantized_base_is_as_small_as_that(kind):
    pytest.importorskip("bitsandbytes")
    model = build_model("llama").to(torch.bfloat16)
    config = model.config
    config.hidden_size, config.intermediate_size = 128, 320
    model = type(model)(config).to(torch.bfloat16).requires_grad_(False)
    plan = plan_of_budget(find_candidates(model), ModuleBudget(0.2), LORA)
    sizes = measure_sizes(settings_of(model, quantization=kind()), plan)
    quantize_base(model, kind(), plan.full_modules)
    total = 0
    for module in model.modules():
        total += sum(p.nbytes for p in module._parameters.values() if p is not None)
        state = getattr(module, "quant_state", None)
        if state is not None:
            nested = state.state2
            total += sum(t.nbytes for t in (state.absmax, state.code, nested.absmax, nested.code))
        if isinstance(getattr(module, "scale", None), torch.Tensor):
            total += module.scale.nbytes + module.state.SCB.nbytes
    assert sizes.frozen_bytes == pytest.approx(total, rel=0.02)


def test_a_budget_is_spent_on_the_largest_modules():
    candidates = find_candidates(build_model("llama"))
    plan = plan_of_budget(candidates, ModuleBudget(0.2), LORA)
    chosen = [candidates[name].weight.numel() for name in plan.full_modules]
    others = [candidates[name].weight.numel() for name in plan.lora_modules]
    assert min(chosen) >= max(others)
    limited = plan_of_budget(candidates, ParameterBudget(0.2), LORA)
    trained = sum(candidates[name].weight.numel() for name in limited.full_modules)
    assert 0 < trained <= 0.2 * sum(module.weight.numel() for module in candidates.values())
