"""Plans as files and in checkpoints, the models that they fit, and their configs for PEFT and TRL."""

import dataclasses
import hashlib
import importlib.util
import json
import struct

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_lightning.adapters import AdapterPlan, LoraSettings, ModuleBudget, PlannedModule
from hybrid_lightning.adapters.plan import model_digest
from hybrid_lightning.assets import embedded_policy_path
from hybrid_lightning.errors import ConfigError, ModelError, PlanError


@pytest.fixture
def plan(make_model, plan_for) -> AdapterPlan:
    return plan_for(make_model("qwen2"))


# ---- files


def test_round_trip_by_a_file_that_a_person_can_read_and_edit(plan, tmp_path):
    path = tmp_path / "plan.json"
    plan.save(path)
    loaded = AdapterPlan.load(path)
    assert loaded == plan and loaded.digest == plan.digest
    lines = path.read_text().splitlines()
    assert lines[1].startswith('  "digest": ') and len(lines) < 14 + len(plan.candidates) + 2
    assert sum('"mode": "full"' in line for line in lines) == 3
    torch.save({"plan": plan.to_dict()}, tmp_path / "checkpoint.pt")
    assert AdapterPlan.from_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["plan"]) == plan
    edited = path.read_text().replace('"mode": "lora"', '"mode": "lora", "rank": 2', 1).replace('"lora"}', '"frozen"}', 1)
    path.write_text(edited)
    with pytest.raises(PlanError, match=r'plan\.json was changed.*delete its line "digest"'):
        AdapterPlan.load(path)
    path.write_text("\n".join(line for line in edited.splitlines() if '"digest"' not in line))
    changed = AdapterPlan.load(path)
    assert len(changed.lora_modules) == 10 and changed.ranks == (2, 4) and changed.digest != plan.digest


def test_every_part_of_the_content_is_in_the_digest_which_does_not_change(plan):
    first = plan.candidates[0]
    changes = {"model": "other", "revision": "v2", "model_digest": "1", "lora": LoraSettings(rank=5), "budget": {}, "seed": 3}
    changes |= {"scorer": None, "calibration": {"rollouts": 1}}
    changes["candidates"] = (dataclasses.replace(first, score=9.0), *plan.candidates[1:])
    assert set(changes) == {field.name for field in dataclasses.fields(plan)}
    digests = {dataclasses.replace(plan, **{name: value}).digest for name, value in changes.items()}
    assert len(digests | {plan.digest}) == len(changes) + 1
    # Digests of plans are in checkpoints
    candidates = (PlannedModule("a.b", (4, 3), 12, 0.5, "full"), PlannedModule("a.c", (4, 3), 12, None, "lora"))
    plan = AdapterPlan("tiny", None, "0" * 64, candidates, LoraSettings(rank=4, alpha=6), {"class_path": "x", "init_args": {}})
    content = plan.to_dict()
    assert content["format"] == 1 and all("rank" not in module for module in content["candidates"])
    assert content["digest"] == "218b1cb95597713fd675d3945d26a4b4de9c7941309c0913390904084af3ecb1"


def changed(place, **changes):
    """An edit of a plan's content: of all, or of one of its modules."""
    return lambda data: (data if place is None else data["candidates"][place]).update(changes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data.pop("model"), "p.json is not an adapter plan: .*'model'; correct it, or make a new one"),
        (lambda data: data.pop("candidates"), "the field 'candidates' is missing"),
        (changed(None, extra=1), "unexpected .*'extra'"),
        (changed(None, format=3), "has format 3, and this version reads 1"),
        (changed(None, candidates=[]), "has no modules"),
        (changed(1, mode="half"), r'k_proj has the mode "half"; it must be one of full, lora, frozen'),
        (changed(1, score=float("nan")), "cannot hold infinite numbers or nan"),
        (changed(1, rank=0), r'k_proj has the rank 0; it must be at least 1; for no LoRA make the mode "frozen"'),
        (changed(1, name="model.layers.0.self_attn.q_proj"), r"self_attn\.q_proj twice"),
    ],
)
def test_what_is_wrong_is_named(plan, edit, message):
    data = {**json.loads(json.dumps(plan.to_dict())), "digest": None}
    edit(data)
    with pytest.raises(PlanError, match=message) as error:
        AdapterPlan.from_dict(data, source="p.json")
    assert "\n" not in str(error.value)


def test_files_that_are_no_plans(tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(PlanError, match=r"plan\.json cannot be read \(No such"):
        AdapterPlan.load(path)
    for content, message in ((b"{,}", "is not JSON"), (b"\xff\xfe\x00", "is not JSON"), (b"[]", "is not an adapter plan")):
        path.write_bytes(content)
        with pytest.raises(PlanError, match=rf"plan\.json {message}"):
            AdapterPlan.load(path)


# ---- models


def test_a_plan_fits_its_model_only(plan, make_model):
    model, other, first = make_model("qwen2"), make_model("qwen2", seed=5), plan.candidates[0]
    plan.check_model(other)
    plan.check_weights(model)
    with pytest.raises(PlanError, match="other weights"):
        plan.check_weights(other)
    with pytest.raises(PlanError, match=r"names model\.layers\.0\.self_attn\.q_proj; this model has no such module"):
        plan.check_model(make_model("gpt2"))
    for changes, message in (
        ({"shape": (99, 32)}, r"q_proj has shape \(99, 32\); here it has \(32, 32\)"),
        ({"name": "model.norm"}, "a Qwen2RMSNorm there, not a linear module"),
    ):
        with pytest.raises(PlanError, match=message):
            dataclasses.replace(plan, candidates=(dataclasses.replace(first, **changes),)).check_model(model)


def test_the_digest_of_a_model_is_as_documented_and_differs_by_values_dtype_shape_and_name_alone(make_model):
    linear = nn.Linear(2, 3)
    with torch.no_grad():
        linear.weight.copy_(torch.arange(6.0).reshape(3, 2))
        linear.bias.fill_(1)
    content = b"bias (3,) torch.float32\n" + struct.pack("<3f", 1, 1, 1)
    content += b"weight (3, 2) torch.float32\n" + struct.pack("<6f", *range(6))
    assert model_digest(linear) == hashlib.sha256(content).hexdigest()
    with pytest.raises(ModelError, match="has no values yet"):
        model_digest(nn.Linear(2, 2, device="meta"))
    models = [make_model("qwen2"), make_model("qwen2", seed=1), make_model("qwen2").bfloat16(), make_model("qwen3")]
    linear = nn.Linear(300, 200).requires_grad_(False)
    models += [nn.ModuleDict({"a": linear}), nn.ModuleDict({"b": linear})]
    digests = [model_digest(model) for model in models]
    assert len(set(digests)) == len(digests)
    linear.requires_grad_(True).weight.data = linear.weight.data.T.contiguous().T
    linear.weight.data[1, 1] += 1
    assert model_digest(models[-1]) == digests[-1], "requires_grad, layout and what is not in the sample do not matter"


# ---- a LoraConfig for code that is not ours: that PEFT makes the same model by it is shown in `export/test_adapter_folder.py`


def test_settings_are_the_plans_and_checked(make_model, plan_for):
    lora = LoraSettings(rank=4, alpha=6.0, dropout=0.1, use_rslora=True)
    plan = plan_for(make_model("llama"), lora=lora, ranks={"mlp": 3})
    names = ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora")
    config = plan.to_peft_config()
    assert [getattr(config, name) for name in names] == [4, 6.0, 0.1, False, True] and len(config.rank_pattern) == 4
    assert config.target_modules == set(plan.lora_modules) and config.modules_to_save == list(plan.full_modules)
    for name, value in (("rank", 0), ("alpha", 0.0), ("dropout", 1.0)):
        with pytest.raises(ConfigError, match=f"{name}={value}"):
            LoraSettings(**{name: value})


@pytest.mark.parametrize(
    ("modes", "message"),
    [
        ({"layers.0": "frozen"}, "leaves all modules frozen"),
        ({"layers.0": "lora", "other.layers.0": "frozen"}, 'would not keep other.layers.0 "frozen", since a module with another'),
        ({"layers.0": "full", "sublayers.0": "frozen"}, 'would not keep sublayers.0 "frozen", since a module with another'),
        ({"layers.0": "lora", "sublayers.0": "frozen"}, None),  # separated at the dot
        ({"layers.0": "lora", "other.layers.0": "full"}, None),  # full goes first
        ({"model.layers.1": "full", "model.layers.11": "lora"}, None),
    ],
)
def test_names_that_peft_cannot_tell_apart_and_a_plan_that_trains_nothing_are_refused(plan, modes, message):
    named = [dataclasses.replace(plan.candidates[0], name=key, mode=mode) for key, mode in modes.items()]
    plan = dataclasses.replace(plan, candidates=tuple(named))
    if message is None:
        assert plan.to_peft_config().modules_to_save == (list(plan.full_modules) or None)
    else:
        with pytest.raises(PlanError, match=message):
            plan.to_peft_config()


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl: pip install 'hybrid-lightning[test]'")
def test_trl_trains_it(plan_for, tmp_path):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    base = AutoModelForCausalLM.from_pretrained(embedded_policy_path())
    plan = plan_for(base, ModuleBudget(0.2))
    quiet = {"bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    sizes = {"max_steps": 2, "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6}
    trainer = GRPOTrainer(  # with a reference policy: the adapter switched off
        model=base,
        args=GRPOConfig(output_dir=str(tmp_path), learning_rate=1e-3, beta=0.1, **sizes, **quiet),
        reward_funcs=lambda completions, **_: [float(text.count("1")) for text in completions],
        train_dataset=Dataset.from_dict({"prompt": [f"{n}*7=" for n in range(100, 132)]}),
        processing_class=AutoTokenizer.from_pretrained(embedded_policy_path()),
        peft_config=plan.to_peft_config(),
    )
    trained = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    assert sum(parameter.numel() for parameter in start.values()) == plan.trainable_parameters()
    trainer.train()
    still = [name for name, parameter in trained.items() if torch.equal(parameter, start[name])]
    assert all(".lora_A." in name for name in still), "their gradients are 0 at first"
