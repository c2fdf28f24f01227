"""Which modules are quantized and how, that adapter and start policy are as exact on them as on plain ones, and runs on them."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from peft import PeftModel
from rounding import additions_of, assert_same_sums
from tiny_models import build_wide_model
from tiny_runs import Log, StartsWithDigit, build_adapter, fit, write_wide_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hybrid_lightning.adapters import LoraSettings, ModuleBudget, Random, adapter_disabled, apply_plan, find_candidates, make_plan
from hybrid_lightning.adapters.apply import trainable_state
from hybrid_lightning.adapters.budgets import ModuleScores
from hybrid_lightning.adapters.plan import PlannedModel, model_digest
from hybrid_lightning.errors import CheckpointError, ConfigError
from hybrid_lightning.export import AdapterFolder, MergedModel, policy_of_checkpoint, write_policy
from hybrid_lightning.losses import GSPOLoss
from hybrid_lightning.model.quantization import NF4, check_quantization, quantize_base
from hybrid_lightning.sharding.fsdp2 import FSDP2Strategy
from hybrid_lightning.training.policy_module import PolicyModule

pytest.importorskip("bitsandbytes")

import bitsandbytes
from bitsandbytes.functional import dequantize_4bit

IDS = torch.randint(3, 40, (3, 9), generator=torch.Generator().manual_seed(7))
VARIANTS = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}


def plan_of(model, share=0.2, variant="lora"):
    candidates, lora = find_candidates(model), LoraSettings(rank=4, alpha=6, **VARIANTS[variant])
    scores = ModuleScores({name: float(number * 7 % 11) for number, name in enumerate(candidates)}, Random(0))
    return make_plan(PlannedModel("test", model_digest(model)), candidates, ModuleBudget(share), lora, scores)


def packed_modules(model):
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module.weight.element_size() == 1}


def unpacked_copy(family, quantized):
    """The same model with plain layers that hold the unpacked weights."""
    plain = build_wide_model(family)
    for name in packed_modules(quantized):
        layer = quantized.get_submodule(name)
        weight = dequantize_4bit(layer.weight.data, layer.quant_state)
        target = plain.get_submodule(name).weight.data
        target.copy_(weight.T if family == "gpt2" else weight)
    return plain


def test_the_weights_are_those_that_transformers_would_load(tmp_path):
    folder = write_wide_model(tmp_path, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    plan, state = plan_of(model), torch.get_rng_state()
    quantize_base(model, NF4(), plan.full_modules)
    assert torch.equal(torch.get_rng_state(), state), "no random number is drawn"
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**options, llm_int8_skip_modules=[*plan.full_modules, "lm_head"])
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    assert packed_modules(theirs) == packed_modules(model)
    for (name, mine), (their_name, other) in zip(model.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == their_name and mine.dtype == other.dtype and torch.equal(mine, other), name


@pytest.mark.parametrize(("family", "variant"), [("llama", "rslora"), ("qwen2", "dora"), ("gpt2", "dora"), ("gpt2", "lora")])
def test_all_but_the_fully_trained_modules_are_quantized_and_the_adapter_is_as_exact_as_on_a_plain_base(family, variant):
    model, tolerance = build_wide_model(family), {"rtol": 1e-4, "atol": 1e-4}
    plan = plan_of(model, variant=variant)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    quantize_base(model, NF4(), plan.full_modules)
    candidates = {module.name for module in plan.candidates}
    assert plan.full_modules and packed_modules(model) == candidates - set(plan.full_modules)
    kept = {name: p for name, p in model.named_parameters() if name.rpartition(".")[0] not in packed_modules(model)}
    assert kept and all(torch.equal(parameter, before[name]) for name, parameter in kept.items())
    assert not any(module.training for module in model.modules())
    plain = unpacked_copy(family, model)
    start = model(IDS).logits
    torch.testing.assert_close(start, plain(IDS).logits, **tolerance)
    adapted, reference = apply_plan(model, plan), apply_plan(plain, plan)
    if variant == "dora":  # it divides lengths by norms that it computes anew
        torch.testing.assert_close(adapted(IDS).logits, start, **tolerance)
    else:
        assert torch.equal(adapted(IDS).logits, start)
    generator = torch.Generator().manual_seed(1)
    for weight in trainable_state(adapted).values():
        weight += 0.05 * torch.randn(weight.shape, generator=generator)
    reference.load_state_dict(trainable_state(adapted), strict=False)
    weights = torch.randn(start.shape, generator=generator)
    for each in (adapted, reference):
        with torch.no_grad():  # as generation does; on some CPUs bitsandbytes' own layer would then lose the gradient
            each(IDS)
        (each(IDS).logits.log_softmax(-1) * weights).sum().backward()
    torch.testing.assert_close(adapted(IDS).logits, reference(IDS).logits, **tolerance)
    gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(gradients) == len(trainable_state(adapted)) and all(value.abs().sum() > 0 for value in gradients.values())
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-3 * float(parameter.grad.abs().max()))
    with adapter_disabled(adapted):
        assert torch.equal(adapted(IDS).logits, start)


def test_a_base_without_anything_to_quantize_is_refused(make_model):
    model = build_wide_model()
    with pytest.raises(ConfigError, match=r"NF4 has nothing to quantize, since the plan trains all 14 .* adapter\.budget\.share"):
        quantize_base(model, NF4(), plan_of(model, share=1).full_modules)
    with pytest.raises(ConfigError, match=r"NF4 has nothing to quantize: .* multiple of 64.* model\.quantization=null"):
        quantize_base(make_model("llama"), NF4(), ())
    assert not packed_modules(model)
    narrow = make_model("llama")  # 48 inputs: blocks of 64 weights span two rows
    narrow.model.layers[0].mlp.up_proj = nn.Linear(64, 48)
    quantize_base(narrow, NF4(), ())
    assert packed_modules(narrow) == {"model.layers.0.mlp.up_proj"}, "what NF4 does not take stays as it is"


def test_strategies_that_split_weights_are_refused_and_bitsandbytes_is_asked_for_by_name(monkeypatch):
    for strategy in (FSDP2Strategy, FSDPStrategy):
        with pytest.raises(ConfigError, match=rf"NF4 does not work with {strategy.__name__}.*trainer\.strategy=ddp"):
            check_quantization(NF4(), strategy())
    for fine in (SingleDeviceStrategy("cpu"), DDPStrategy()):
        check_quantization(NF4(), fine)
    monkeypatch.setattr("hybrid_lightning.model.quantization.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"NF4 needs the package bitsandbytes.*hybrid-lightning\[quantization\]"):
        NF4()


# ---- runs


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return write_wide_model(tmp_path_factory.mktemp("quantized"))


def run(wide, sums, root, quantization, steps=4, adapter=None, ckpt=None, flags=None, **policy):
    rates = {"optimizer": bitsandbytes.optim.AdamW8bit, "lr_lora": 3e-3, "minibatches_per_rollout": 2}
    arguments = {"loss": GSPOLoss(kl_coef=0.01), "reward": StartsWithDigit(), "quantization": quantization, **rates, **policy}
    log, saver = Log(), ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    flags = {"max_steps": steps, "enable_checkpointing": True, **(flags or {})}
    return log, fit(wide, sums, root, build_adapter(**(adapter or {})), saver, log, policy=arguments, ckpt=ckpt, **flags)


def test_it_trains_resumes_bit_for_bit_by_no_other_quantization_and_is_exported_onto_the_base(wide, sums, tmp_path):
    log, module = run(wide, sums, tmp_path, NF4())
    assert len(log.losses) == 4 and len(set(log.losses)) > 2
    assert all(step["sampling/logp_difference/mean"] < 1e-4 for step in log.metrics)
    assert any(step["grad_norm/full"] > 0 and step["grad_norm/lora"] > 0 for step in log.metrics)
    assert log.metrics[0]["kl"] == 0 < log.metrics[-1]["kl"], "the KL to the start policy is zero at the start policy"
    assert sum(p.element_size() == 1 for p in module.parameters()) == len(module.plan.lora_modules) > 0
    with pytest.raises(CheckpointError, match=r"trained with model\.quantization=NF4, but it is null now"):
        run(wide, sums, tmp_path, None, ckpt=tmp_path / "step=1.ckpt")
    rest, resumed = run(wide, sums, tmp_path / "resumed", NF4(), ckpt=tmp_path / "step=1.ckpt")
    assert rest.metrics == log.metrics[1:]
    weights = dict(resumed.named_parameters())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in module.named_parameters())
    expected = apply_plan(AutoModelForCausalLM.from_pretrained(wide), module.plan)
    expected.load_state_dict(trainable_state(module.model), strict=False)
    expected = expected.eval()(IDS).logits
    policy = policy_of_checkpoint(tmp_path / "step=4.ckpt")
    merged = AutoModelForCausalLM.from_pretrained(write_policy(policy, MergedModel("float32"), tmp_path / "merged"))
    assert "hybrid_lightning.model.NF4" in (tmp_path / "merged" / "README.md").read_text()
    adapter = AutoModelForCausalLM.from_pretrained(wide)
    adapter = PeftModel.from_pretrained(adapter, write_policy(policy, AdapterFolder(), tmp_path / "adapter"))
    for exported in (merged, adapter):
        assert_same_sums(exported(IDS).logits, expected, additions_of(exported, IDS.shape[1]))
    quantized = module.eval().model(IDS).logits
    error = float((merged(IDS).logits - quantized).norm() / quantized.norm())
    assert 1e-4 < error < 0.3, "off by the rounding of the base alone"


@pytest.mark.parametrize(
    ("policy", "adapter", "flags"),
    [
        ({"dtype": "bfloat16", "gradient_checkpointing": True}, {}, {"precision": "bf16-mixed"}),
        (
            {"loss": GSPOLoss(), "optimizer": bitsandbytes.optim.PagedAdamW8bit},
            *({"keep_start_weights": False, "use_dora": True}, {"gradient_clip_val": 0.5}),
        ),
    ],
    ids=["bfloat16", "freed start weights, DoRA and a paged optimizer"],
)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_it_trains_with(wide, sums, tmp_path, policy, adapter, flags):
    log, module = run(wide, sums, tmp_path, NF4(), steps=3, adapter=adapter, flags=flags, **policy)
    assert log.metrics[0]["ratio/max"] == 1 and log.metrics[0].get("kl", 0) == 0
    assert {parameter.dtype for parameter in module.parameters() if parameter.requires_grad} == {torch.float32}
    loaded = PolicyModule.load_from_checkpoint(tmp_path / "step=3.ckpt").eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled="precision" in flags):
        assert torch.equal(loaded.model(IDS).logits, module.eval().model(IDS).logits)
        if "keep_start_weights" not in adapter:
            with loaded.policy.start_policy(), module.policy.start_policy():
                assert torch.equal(loaded.model(IDS).logits, module.model(IDS).logits)
    assert type(loaded.policy.quantization) is NF4
