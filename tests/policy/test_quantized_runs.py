"""Runs on a quantized base: trained, resumed, loaded, exported, and started by the command line."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from rounding import additions_of, assert_same_sums
from tiny_runs import Log, StartsWithDigit, build_adapter, fit, write_sums
from transformers import AutoModelForCausalLM
from wide_models import write_wide_model

from hybrid_lightning.adapters.apply import apply_plan, trainable_state
from hybrid_lightning.adapters.plan import model_digest
from hybrid_lightning.errors import CheckpointError
from hybrid_lightning.export import AdapterFolder, MergedModel, policy_of_checkpoint, write_policy
from hybrid_lightning.losses import GSPOLoss
from hybrid_lightning.policy.adaptation import CHECKPOINT_KEY
from hybrid_lightning.policy.module import PolicyModule
from hybrid_lightning.policy.quantization import NF4, Int8

bitsandbytes = pytest.importorskip("bitsandbytes")

IDS = torch.randint(3, 40, (3, 9), generator=torch.Generator().manual_seed(7))
KINDS = [NF4, Int8]
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    write_wide_model(folder / "model")
    write_sums(folder / "sums.jsonl")
    return folder


def run(folder, root, quantization, steps=STEPS, adapter=None, flags=None, ckpt=None, **policy):
    arguments = {
        "loss": GSPOLoss(kl_coef=0.01),
        "reward": StartsWithDigit(),
        "optimizer": bitsandbytes.optim.AdamW8bit,
        "minibatches_per_rollout": 2,
        "lr_lora": 3e-3,
        "quantization": quantization,
        **policy,
    }
    log, saver = Log(), ModelCheckpoint(root, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    flags = {"max_steps": steps, "enable_checkpointing": True, **(flags or {})}
    callbacks = (build_adapter(**(adapter or {})), saver, log)
    module = fit(folder / "model", folder / "sums.jsonl", root, *callbacks, policy=arguments, ckpt=ckpt, **flags)
    return log, module


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def trained(request, folder):
    root = folder / request.param.__name__
    log, module = run(folder, root, request.param())
    return root, log, module


def packed(module):
    weights = {name: p for name, p in module.named_parameters() if p.element_size() == 1}
    assert len(weights) == len(module.plan.lora_modules) > 0
    return weights


def test_it_trains_and_agrees_with_its_sampler(trained):
    _, log, module = trained
    assert len(log.losses) == STEPS and len(set(log.losses)) > 3
    assert all(step["sampling/logp_difference/mean"] < 1e-4 for step in log.metrics)
    assert any(step["grad_norm/full"] > 0 and step["grad_norm/lora"] > 0 for step in log.metrics)
    assert log.metrics[0]["kl"] == 0 < log.metrics[-1]["kl"], "the KL to the start policy is zero at the start policy"
    assert packed(module) and all(p.dtype == torch.float32 for p in module.parameters() if p.requires_grad)


def test_resumed_it_goes_on_bit_for_bit(trained, folder, tmp_path):
    root, log, module = trained
    rest, resumed = run(folder, tmp_path, module.quantization, ckpt=root / "step=3.ckpt")
    assert rest.metrics == log.metrics[3:]
    weights = dict(resumed.named_parameters())
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def test_the_checkpoint_holds_trained_weights_and_knows_the_sixteen_bit_base(trained, folder):
    root, _, module = trained
    content = torch.load(root / f"step={STEPS}.ckpt", weights_only=True)
    assert content["state_dict"].keys() == {name for name, p in module.named_parameters() if p.requires_grad}
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert content[CHECKPOINT_KEY]["base_digest"] == module.plan.model_digest == model_digest(base)
    states = content["optimizer_states"][0]["state"]
    dtypes = {value.dtype for state in states.values() for value in state["__bnb_optimizer_quant_state__"].values()}
    assert torch.uint8 in dtypes


def test_it_is_exported_onto_the_sixteen_bit_base(trained, folder, tmp_path):
    root, _, module = trained
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    expected = apply_plan(base, module.plan)
    expected.load_state_dict(trainable_state(module.model), strict=False)
    expected = expected.eval()(IDS).logits
    policy = policy_of_checkpoint(root / f"step={STEPS}.ckpt")
    merged = AutoModelForCausalLM.from_pretrained(write_policy(policy, MergedModel("float32"), tmp_path / "merged"))
    assert f"hybrid_lightning.policy.{type(module.quantization).__name__}" in (tmp_path / "merged" / "README.md").read_text()
    assert_same_sums(merged(IDS).logits, expected, additions_of(merged, IDS.shape[1]))
    plain = AutoModelForCausalLM.from_pretrained(folder / "model")
    adapter = PeftModel.from_pretrained(plain, write_policy(policy, AdapterFolder(), tmp_path / "adapter"))
    assert_same_sums(adapter(IDS).logits, expected, additions_of(adapter, IDS.shape[1]))
    quantized = module.eval().model(IDS).logits
    error = (merged(IDS).logits - quantized).norm() / quantized.norm()
    assert 1e-4 < float(error) < (0.3 if isinstance(module.quantization, NF4) else 0.05), "off by the rounding of the base alone"


def test_another_quantization_than_the_checkpoints_is_refused(trained, folder, tmp_path):
    root, _, module = trained
    name = type(module.quantization).__name__
    with pytest.raises(CheckpointError, match=rf"trained with model\.quantization={name}, but it is null now"):
        run(folder, tmp_path, None, ckpt=root / "step=3.ckpt")


@pytest.mark.parametrize(
    ("kind", "policy", "adapter", "flags"),
    [
        (NF4, {"dtype": "bfloat16", "gradient_checkpointing": True}, {}, {"precision": "bf16-mixed"}),
        (Int8, {"loss": GSPOLoss()}, {"keep_start_weights": False, "use_dora": True}, {}),
        (NF4, {"optimizer": bitsandbytes.optim.PagedAdamW8bit}, {"share": 0.0}, {"gradient_clip_val": 0.5}),
    ],
    ids=["bfloat16", "freed start weights and DoRA", "paged optimizer and LoRA alone"],
)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_it_trains_with(folder, tmp_path, kind, policy, adapter, flags):
    _, module = run(folder, tmp_path, kind(), steps=3, adapter=adapter, flags=flags, **policy)
    content = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    loaded = PolicyModule.load_from_checkpoint(tmp_path / "step=3.ckpt").eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled="precision" in flags):
        assert torch.equal(loaded.model(IDS).logits, module.eval().model(IDS).logits)
        if "keep_start_weights" not in adapter:
            with loaded.start_policy(), module.start_policy():
                assert torch.equal(loaded.model(IDS).logits, module.model(IDS).logits)
    assert type(loaded.quantization) is kind
    up = [weight for name, weight in content["state_dict"].items() if "lora_B" in name]
    assert up and any(weight.abs().sum() > 0 for weight in up), "B starts at zero"
