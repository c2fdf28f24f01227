"""Weights of real adapted models, counted without them."""

import pytest
import torch
from tiny_models import build_model

from benchmarks.memory.quantization import frozen_tensors
from benchmarks.training import tensor_bytes
from hybrid_lightning.adapters import LoraSettings, ModuleBudget, apply_plan, find_candidates
from hybrid_lightning.adapters.budgets import plan_of_budget
from hybrid_lightning.memory.sizes import measure_sizes
from hybrid_lightning.model import NF4
from hybrid_lightning.model.quantization import quantize_base
from hybrid_lightning.sharding.parameters import decoder_blocks

LORA, MIXED = LoraSettings(rank=4), {"mlp": 3, "attention": 0}


def held(*modules):
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())


# Families, shares, whether start weights are kept, dtypes and ranks.
@pytest.mark.parametrize(
    ("family", "share", "keep", "dtype", "ranks"),
    [
        *(("gemma", 0.0, True, torch.float32, MIXED), ("gpt2", 0.3, False, torch.bfloat16, {})),
        *(("llama", 0.3, True, torch.bfloat16, MIXED), ("qwen2", 1.0, False, torch.float32, {})),
        *(("qwen3", 0.3, False, torch.float32, MIXED), ("gpt2", 0.3, True, torch.float32, MIXED)),
    ],
)
def test_weights_equal_the_adapted_models(family, share, keep, dtype, ranks):
    model = build_model(family).to(dtype)
    plan = plan_of_budget(find_candidates(model), ModuleBudget(share), LORA, ranks)
    sizes = measure_sizes(model, plan, keep)
    assert sizes.parameters == sum(parameter.numel() for parameter in model.parameters())
    adapted = apply_plan(model, plan, keep)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert sizes.weight_bytes == held(adapted)
    assert (sizes.trainable, sizes.trained_bytes) == (sum(p.numel() for p in trained), sum(p.nbytes for p in trained))
    blocks = decoder_blocks(adapted)
    assert sizes.block_bytes == max(map(held, blocks)) and sizes.outside_bytes == held(adapted) - held(*blocks)
    full = sum(module.parameters for module in plan.candidates if module.mode == "full")
    assert sizes.trained.share_full == pytest.approx(full / sizes.candidates)


def test_a_quantized_base_is_as_small_as_that():
    pytest.importorskip("bitsandbytes")
    model = build_model("llama", hidden_size=128, intermediate_size=320).to(torch.bfloat16)
    plan = plan_of_budget(find_candidates(model), ModuleBudget(0.2), LORA)
    sizes = measure_sizes(model, plan, True, NF4())
    quantize_base(model, NF4(), plan.full_modules)
    assert sizes.frozen_bytes == pytest.approx(tensor_bytes(frozen_tensors(model)), rel=0.02)
