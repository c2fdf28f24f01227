import contextlib
import copy
import dataclasses
import warnings

import pytest
import torch
from peft import PeftModel
from rounding import additions_of, assert_same_sums
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from hybrid_lightning.adapters.apply import adapter_disabled, apply_plan, parameter_groups, trainable_state
from hybrid_lightning.adapters.budgets import ModuleBudget
from hybrid_lightning.adapters.lora_settings import LoraSettings
from hybrid_lightning.errors import ConfigError, PlanError

FAMILIES = ["llama", "qwen2", "qwen3", "gemma", "gpt2"]
SETTINGS = {
    "lora": LoraSettings(rank=4, alpha=8),
    "dora": LoraSettings(rank=4, alpha=8, use_dora=True),
    "rslora": LoraSettings(rank=4, alpha=8, dropout=0.1, use_rslora=True),
}


def autocast(dtype: torch.dtype) -> contextlib.AbstractContextManager:
    return torch.autocast("cpu", dtype) if dtype == torch.bfloat16 else contextlib.nullcontext()


def logits(model: nn.Module, batches, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad(), autocast(dtype):
        return model(batches[0]).logits


def train(model: nn.Module, batches, dtype: torch.dtype = torch.float32, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for tokens in batches[:steps]:
        with autocast(dtype):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("share", [0, 0.2, 1])
def test_start_policy_is_the_base_bit_for_bit(make_model, plan_for, batches, dtype, settings, share):
    """Before any step, and with the adapter disabled after some."""
    model = make_model("qwen2").to(dtype)
    base = logits(model, batches, dtype)
    adapted = apply_plan(model, plan_for(model, ModuleBudget(share), SETTINGS[settings])).eval()
    assert torch.equal(logits(adapted, batches, dtype), base)
    train(adapted, batches, dtype)
    trained = logits(adapted, batches, dtype)
    assert not torch.equal(trained, base)
    with adapter_disabled(adapted):
        assert torch.equal(logits(adapted, batches, dtype), base)
    assert torch.equal(logits(adapted, batches, dtype), trained)


@pytest.mark.parametrize("share", [0, 0.3, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_wrapped_set_is_the_plan(make_model, plan_for, batches, family, share):
    model = make_model(family)
    base = logits(model, batches)
    plan = plan_for(model, ModuleBudget(share))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="peft.tuners")
        adapted = apply_plan(model, plan).eval()
    assert torch.equal(logits(adapted, batches), base)
    full, lora = parameter_groups(adapted)
    prefix = "base_model.model."
    assert {name.split(".modules_to_save")[0] for name in full} == {prefix + name for name in plan.full_modules}
    assert {name.split(".lora_")[0] for name in lora} == {prefix + name for name in plan.lora_modules}
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trainable == {*full, *lora}
    assert sum(p.numel() for p in (*full.values(), *lora.values())) == plan.trainable_parameters()


def test_full_training_includes_the_bias_and_lora_leaves_it(make_model, plan_for):
    model = make_model("qwen2")
    plan = plan_for(model)
    modes = ["full" if name.name.endswith("0.self_attn.q_proj") else "lora" for name in plan.candidates]
    candidates = tuple(dataclasses.replace(m, mode=mode) for m, mode in zip(plan.candidates, modes, strict=True))
    full, lora = parameter_groups(apply_plan(model, dataclasses.replace(plan, candidates=candidates)))
    assert [name.rsplit(".", 1)[1] for name in full] == ["weight", "bias"]
    assert not any("bias" in name for name in lora)


def test_frozen_modules_are_left_alone(make_model, plan_for, batches):
    model = make_model("llama")
    plan = plan_for(model)
    candidates = tuple(dataclasses.replace(m, mode="frozen") if "mlp" in m.name else m for m in plan.candidates)
    adapted = apply_plan(model, dataclasses.replace(plan, candidates=candidates))
    assert all(type(layer.mlp.up_proj) is nn.Linear for layer in adapted.get_base_model().model.layers)
    nothing = tuple(dataclasses.replace(m, mode="frozen") for m in plan.candidates)
    with pytest.raises(PlanError, match="leaves all modules frozen"):
        apply_plan(make_model("llama"), dataclasses.replace(plan, candidates=nothing))


@pytest.mark.parametrize("keep", [True, False])
def test_all_trainable_weights_are_float32_on_a_frozen_bfloat16_base(make_model, plan_for, batches, keep):
    model = make_model("llama").bfloat16()
    base = copy.deepcopy(model).state_dict()
    adapted = apply_plan(model, plan_for(model), keep_start_weights=keep)
    train(adapted, batches, torch.bfloat16)
    for name, parameter in adapted.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
        if not parameter.requires_grad:
            start = base[name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")]
            assert torch.equal(parameter, start)


@pytest.mark.parametrize("share", [0.2, 1])
def test_without_start_weights(make_model, plan_for, batches, share):
    """Budget 1 holds no second copy, trains the same, and says why the adapter cannot be disabled."""
    kept, freed = (make_model("qwen2") for _ in range(2))
    plan = plan_for(kept, ModuleBudget(share))
    parameters = sum(p.numel() for p in kept.parameters())
    start = {p.data_ptr() for p in freed.parameters()}
    models = []
    for model, keep in ((kept, True), (freed, False)):
        torch.manual_seed(0)
        models.append(apply_plan(model, plan, keep_start_weights=keep).eval())
    assert torch.equal(logits(models[0], batches), logits(models[1], batches))
    full, lora = parameter_groups(models[1])
    assert sum(p.numel() for p in models[1].parameters()) == parameters + sum(p.numel() for p in lora.values())
    assert {p.data_ptr() for p in full.values()} < start  # the very same memory
    for model in models:
        train(model, batches)
    assert torch.equal(logits(models[0], batches), logits(models[1], batches))
    with pytest.raises(ConfigError, match="keep_start_weights=True"), adapter_disabled(models[1]):
        pytest.fail("the start policy is gone")
    with pytest.raises(ConfigError, match="were freed"), models[1].disable_adapter():
        models[1](batches[0])
    merged = models[1].merge_and_unload()
    assert not any(p.is_meta for p in merged.parameters())
    assert_same_sums(logits(merged, batches), logits(models[0], batches), additions_of(merged, batches[0].shape[1]))


def test_plain_lora_needs_no_start_weights(make_model, plan_for, batches):
    model = make_model("llama")
    base = logits(model, batches)
    adapted = apply_plan(model, plan_for(model, ModuleBudget(0)), keep_start_weights=False)
    train(adapted, batches)
    with adapter_disabled(adapted):
        assert torch.equal(logits(adapted, batches), base)


def test_disabling_restores_flags_also_after_an_error(make_model, plan_for, batches):
    model = make_model("llama")
    adapted = apply_plan(model, plan_for(model))
    some = next(iter(parameter_groups(adapted)[1].values())).requires_grad_(False)
    flags = [p.requires_grad for p in adapted.parameters()]
    with pytest.raises(KeyError), adapter_disabled(adapted):
        raise KeyError
    assert [p.requires_grad for p in adapted.parameters()] == flags and not some.requires_grad
    train(adapted, batches)
    with adapter_disabled(adapted), adapter_disabled(adapted):  # nested
        pass
    assert [p.requires_grad for p in adapted.parameters()] == flags
    adapted.merge_adapter()
    with pytest.raises(ConfigError, match="unmerge"), adapter_disabled(adapted):
        pytest.fail("merged weights are not those of the start")


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_merging_agrees(make_model, plan_for, batches, family, settings):
    model = make_model(family, std=0.05)
    adapted = apply_plan(model, plan_for(model, lora=SETTINGS[settings]))
    train(adapted, batches)
    before = logits(adapted, batches)
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert not isinstance(merged, PeftModel)
    assert_same_sums(logits(merged, batches), before, additions_of(merged, batches[0].shape[1]))
    assert torch.equal(logits(adapted, batches), before)


@pytest.mark.parametrize("share", [0, 0.2, 1])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_saving_and_loading_with_peft(make_model, plan_for, batches, tmp_path, family, share):
    model = make_model(family)
    adapted = apply_plan(model, plan_for(model, ModuleBudget(share)))
    train(adapted, batches)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(family), tmp_path).eval()
    assert torch.equal(logits(loaded, batches), logits(adapted, batches))


def test_more_than_twenty_lora_modules(plan_for, batches, tmp_path):
    """From there on PEFT shortens the names."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 48}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=11))
    base = copy.deepcopy(model)
    plan = plan_for(model, ModuleBudget(0.3), seed=3)
    adapted = apply_plan(model, plan)
    train(adapted, batches)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(logits(loaded, batches), logits(adapted, batches))


def test_state_restores_the_adapter(make_model, plan_for, batches):
    models = [make_model("llama") for _ in range(2)]
    plan = plan_for(models[0])
    first, second = (apply_plan(model, plan) for model in models)
    train(first, batches)
    state = trainable_state(first)
    assert set(state) <= set(first.state_dict()) and not any(tensor.requires_grad for tensor in state.values())
    assert sum(tensor.numel() for tensor in state.values()) == plan.trainable_parameters()
    with adapter_disabled(first):
        assert set(trainable_state(first)) == set(state)
    assert second.load_state_dict(state, strict=False).unexpected_keys == []
    assert torch.equal(logits(first.eval(), batches), logits(second.eval(), batches))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(make_model, plan_for, batches, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = make_model("llama")
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(0)
        adapted = apply_plan(model, plan_for(model)).train()
        adapted(batches[0], labels=batches[0]).loss.backward()
        gradients.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("settings", ["lora", "dora"])
def test_on_a_four_bit_base(plan_for, batches, tmp_path, settings):
    """Planned on 16 bits, then loaded with the fully trained modules left out of quantization."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 64}
    start = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2))
    plan = plan_for(start, lora=SETTINGS[settings])
    start.save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=[*plan.full_modules, "lm_head"],
    )
    options = {"dtype": torch.bfloat16, "quantization_config": quantization}
    model = LlamaForCausalLM.from_pretrained(tmp_path, **options).train()  # in eval mode bitsandbytes repacks weights
    base = logits(model, batches, torch.bfloat16)
    adapted = apply_plan(model, plan)
    assert torch.equal(logits(adapted, batches, torch.bfloat16), base)
    train(adapted, batches, torch.bfloat16)
    adapted.train()
    assert not torch.equal(logits(adapted, batches, torch.bfloat16), base)
    with adapter_disabled(adapted):
        assert torch.equal(logits(adapted, batches, torch.bfloat16), base)


def test_tied_embeddings_stay_tied(make_model, plan_for, batches):
    model = make_model("gemma")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    adapted = apply_plan(model, plan_for(model)).get_base_model()
    assert adapted.lm_head.weight is adapted.model.embed_tokens.weight
