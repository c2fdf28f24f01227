import copy
import dataclasses
import warnings

import pytest
import torch
from peft import get_peft_model
from peft.utils.save_and_load import set_peft_model_state_dict
from rounding import additions_of, assert_same_logits, assert_same_sums
from tiny_families import family_config
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3Config

from hybrid_lightning.adapters.apply import adapter_disabled, apply_plan, parameter_groups, trainable_state
from hybrid_lightning.adapters.budgets import ModuleBudget
from hybrid_lightning.adapters.candidates import module_group
from hybrid_lightning.adapters.lora_settings import ADAPTER, LoraSettings
from hybrid_lightning.errors import ConfigError, ModelError, PlanError
from hybrid_lightning.export.trained import peft_weights

SETTINGS = {
    "lora": LoraSettings(rank=4, alpha=8),
    "dora": LoraSettings(rank=4, alpha=8, use_dora=True),
    "rslora": LoraSettings(rank=4, alpha=8, dropout=0.1, use_rslora=True),
}


def logits(model: nn.Module, batches, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        return model(batches[0]).logits


def train(model: nn.Module, batches, dtype: torch.dtype = torch.float32, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for tokens in batches[:steps]:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


MIXED = {"mlp": 3, "attention": 1}


@pytest.mark.parametrize(
    ("family", "dtype", "settings", "share", "ranks"),
    [
        ("qwen2", torch.bfloat16, "dora", 0.3, {}),
        ("qwen2", torch.float32, "rslora", 1, {}),
        ("llama", torch.bfloat16, "rslora", 0, {}),
        ("llama", torch.bfloat16, "lora", 1, {}),
        ("gpt2", torch.float32, "rslora", 0.3, MIXED),
        ("qwen3", torch.float32, "lora", 0.3, MIXED),
        ("gemma", torch.float32, "dora", 0.3, MIXED),
    ],
)
def test_start_policy_is_the_base_bit_for_bit(make_model, plan_for, batches, family, dtype, settings, share, ranks):
    """Before any step, and with the adapter disabled after some; what is wrapped and trained is the plan."""
    model, lora = make_model(family).to(dtype), SETTINGS[settings]
    base = logits(model, batches, dtype)
    plan = plan_for(model, ModuleBudget(share), lora, ranks=ranks)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="peft.tuners")
        adapted = apply_plan(model, plan, keep_start_weights=share > 0).eval()  # plain LoRA needs no copies of them
    assert torch.equal(logits(adapted, batches, dtype), base)
    train(adapted, batches, dtype)
    trained = logits(adapted, batches, dtype)
    assert not torch.equal(trained, base)
    with adapter_disabled(adapted):
        assert torch.equal(logits(adapted, batches, dtype), base)
    assert torch.equal(logits(adapted, batches, dtype), trained)
    assert all(p.dtype == (torch.float32 if p.requires_grad else dtype) for p in adapted.parameters())

    full, lora_weights = parameter_groups(adapted)
    prefix = "base_model.model."
    assert {name.split(".modules_to_save")[0] for name in full} == {prefix + name for name in plan.full_modules}
    assert {name.split(".lora_")[0] for name in lora_weights} == {prefix + name for name in plan.lora_modules}
    weights = trainable_state(adapted)
    assert weights.keys() == {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert weights.keys() == {*full, *lora_weights}
    assert sum(weight.numel() for weight in weights.values()) == plan.trainable_parameters()
    for name in plan.lora_modules:
        layer, rank = adapted.get_base_model().get_submodule(name), MIXED[module_group(name)] if ranks else 4
        # alpha / rank stays 2; with rsLoRA alpha stays 8.
        scale = 8 / rank**0.5 if lora.use_rslora else 2
        assert layer.r[ADAPTER] == rank and layer.scaling[ADAPTER] == pytest.approx(scale)
    if family == "gemma":
        base = adapted.get_base_model()
        assert base.lm_head.weight is base.model.embed_tokens.weight, "tied embeddings stay tied"


@pytest.mark.parametrize("share", [0.2, 1])
def test_without_start_weights(make_model, plan_for, batches, share):
    """Budget 1 holds no second copy, trains the same, and explains why the adapter cannot be disabled."""
    models = [make_model("qwen2") for _ in range(2)]
    plan = plan_for(models[0], ModuleBudget(share))
    parameters, start = sum(p.numel() for p in models[0].parameters()), {p.data_ptr() for p in models[1].parameters()}
    for place, keep in enumerate((True, False)):
        torch.manual_seed(0)
        models[place] = apply_plan(models[place], plan, keep_start_weights=keep).eval()
    kept, freed = models
    assert torch.equal(logits(kept, batches), logits(freed, batches))
    full, lora = parameter_groups(freed)
    assert sum(p.numel() for p in freed.parameters()) == parameters + sum(p.numel() for p in lora.values())
    assert {p.data_ptr() for p in full.values()} < start  # the very same memory
    for model in models:
        train(model, batches)
    assert torch.equal(logits(kept, batches), logits(freed, batches))
    with pytest.raises(ConfigError, match="keep_start_weights=True"), adapter_disabled(freed):
        pytest.fail("the start policy is gone")
    with pytest.raises(ConfigError, match="were freed"), freed.disable_adapter():
        freed(batches[0])
    half = apply_plan(make_model("qwen2").bfloat16(), plan, keep_start_weights=False)
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    merged = freed.merge_and_unload()
    assert not any(p.is_meta for p in merged.parameters())
    assert_same_sums(logits(merged, batches), logits(kept, batches), additions_of(merged, batches[0].shape[1]))


def test_disabling_restores_flags_also_after_an_error(make_model, plan_for):
    model = make_model("llama")
    adapted = apply_plan(model, plan_for(model))
    next(iter(parameter_groups(adapted)[1].values())).requires_grad_(False)
    flags = [p.requires_grad for p in adapted.parameters()]
    with pytest.raises(KeyError), adapter_disabled(adapted):
        raise KeyError
    assert [p.requires_grad for p in adapted.parameters()] == flags
    with adapter_disabled(adapted), adapter_disabled(adapted):  # nested
        pass
    assert [p.requires_grad for p in adapted.parameters()] == flags
    adapted.merge_adapter()
    with pytest.raises(ConfigError, match="unmerge"), adapter_disabled(adapted):
        pytest.fail("merged weights are not the start weights")


# ---- refused


def test_an_adapted_model_or_another_one_is_refused(make_model, plan_for):
    model = make_model("llama")
    plan = plan_for(model)
    adapted = apply_plan(model, plan)
    for again in (adapted, adapted.get_base_model(), nn.ModuleList([adapted])):
        with pytest.raises(ModelError, match="already has"):
            apply_plan(again, plan)
    with pytest.raises(PlanError, match="no such module"):
        apply_plan(make_model("gpt2"), plan)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_module_that_peft_cannot_tell_from_one_of_the_plan_is_noticed(plan_for, mode):
    """A module unknown to the plan; `AdapterPlan.to_peft_config` tells the known ones apart."""
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model.other = nn.Module()
    model.other.layers = nn.ModuleList([nn.Linear(4, 4)])
    model.prepare_inputs_for_generation = lambda: None
    plan = plan_for(model, ModuleBudget(0.3))
    modes = {"layers.0": mode, "layers.1": "lora"}
    candidates = tuple(dataclasses.replace(m, mode=modes[m.name]) for m in plan.candidates if m.name in modes)
    with pytest.raises(PlanError, match=r"first difference is other\.layers\.0"):
        apply_plan(model, dataclasses.replace(plan, candidates=candidates))


def test_modules_that_peft_takes_for_experts_have_lora_here_and_in_plain_peft(plan_for, batches):
    """Modules of a dense layer and of shared experts, at ranks of their own. The config for PEFT names their weights."""
    config = DeepseekV3Config(**family_config("deepseek_v3").to_dict() | {"num_hidden_layers": 2})
    base = AutoModelForCausalLM.from_config(config).eval()
    plan = plan_for(base, ModuleBudget(0), SETTINGS["lora"], ranks=MIXED)
    adapted = apply_plan(copy.deepcopy(base), plan).eval()
    assert base.config.model_type == adapted.config.model_type == "deepseek_v3"
    for weight in trainable_state(adapted).values():
        weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(weight)))
    plain = get_peft_model(copy.deepcopy(base), plan.to_peft_config(base)).eval()
    weights = peft_weights(trainable_state(adapted), plan, "the test")
    assert any("shared_experts" in name for name in weights)
    assert not set_peft_model_state_dict(plain, weights).unexpected_keys
    assert not torch.equal(logits(plain, batches), logits(base, batches))
    assert_same_logits(logits(plain, batches), logits(adapted, batches))
    with pytest.raises(ConfigError, match=r"PEFT cannot load DoRA on 6 modules of DeepseekV3.*; export form=MergedModel"):
        dataclasses.replace(plan, lora=SETTINGS["dora"]).to_peft_config(base)
