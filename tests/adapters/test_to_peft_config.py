"""The plan as a `LoraConfig` in code that is not ours: what PEFT makes of it, a bare training loop, and TRL's trainer."""

import dataclasses
import importlib.util

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_lightning.adapters.apply import apply_plan
from hybrid_lightning.adapters.budgets import ModuleBudget
from hybrid_lightning.adapters.lora_settings import LoraSettings
from hybrid_lightning.assets import embedded_policy_path
from hybrid_lightning.errors import ConfigError, PlanError

SHARES = [0, 0.2, 1]


def wrapped(model, kind):
    return {name for name, module in model.get_base_model().named_modules() if isinstance(module, kind)}


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # a plan does not say how GPT-2 lays out its weights
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("share", SHARES)
def test_peft_adapts_what_the_plan_says(make_model, plan_for, family, share):
    plan = plan_for(make_model(family), ModuleBudget(share))
    model = get_peft_model(make_model(family), plan.to_peft_config())
    assert wrapped(model, BaseTunerLayer) == set(plan.lora_modules)
    assert wrapped(model, ModulesToSaveWrapper) == set(plan.full_modules)
    assert sum(parameter.numel() for parameter in trained(model).values()) == plan.trainable_parameters()


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"use_rslora": True, "dropout": 0.1}], ids=str)
def test_a_bare_loop_trains_like_ours(make_model, plan_for, batches, share, variant):
    """The same steps on PEFT's model and on the one that `apply_plan` makes."""
    plan = plan_for(make_model("llama"), ModuleBudget(share), LoraSettings(rank=4, alpha=8, **variant))
    models = []
    for build in (
        lambda: get_peft_model(make_model("llama"), plan.to_peft_config()),
        lambda: apply_plan(make_model("llama"), plan),
    ):
        torch.manual_seed(3)
        model = build().train()
        # Not Adam, which makes a step of full size of the rounding error of a gradient near zero.
        optimizer = torch.optim.SGD(trained(model).values(), lr=0.1, momentum=0.9)
        for tokens in batches[:3]:
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    theirs, ours = map(trained, models)
    start = trained(get_peft_model(make_model("llama"), plan.to_peft_config()))
    assert theirs.keys() == ours.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-5)
        assert not torch.equal(weight, start[name]), f"{name} was trained"


def test_settings_are_the_plans_unless_given(make_model, plan_for):
    plan = plan_for(make_model("llama"), lora=LoraSettings(rank=4, alpha=6.0, dropout=0.1, use_rslora=True))
    config = plan.to_peft_config()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_dora, config.use_rslora) == (4, 6.0, 0.1, False, True)
    assert config.target_modules == set(plan.lora_modules) and config.modules_to_save == list(plan.full_modules)
    config = plan.to_peft_config(rank=8, alpha=1.0, dropout=0.0, use_dora=True, use_rslora=False)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_dora, config.use_rslora) == (8, 1.0, 0.0, True, False)
    with pytest.raises(ConfigError, match="rank=0"):
        plan.to_peft_config(rank=0)


def test_the_config_survives_a_file(make_model, plan_for, tmp_path):
    for share in SHARES:
        plan = plan_for(make_model("llama"), ModuleBudget(share))
        plan.to_peft_config().save_pretrained(tmp_path)
        model = get_peft_model(make_model("llama"), LoraConfig.from_pretrained(tmp_path))
        assert wrapped(model, ModulesToSaveWrapper) == set(plan.full_modules)
        assert wrapped(model, BaseTunerLayer) == set(plan.lora_modules)


@pytest.mark.parametrize(
    ("modes", "name"),
    [
        ({"layers.0": "lora", "other.layers.0": "frozen"}, "other.layers.0"),
        ({"layers.0": "full", "other.layers.0": "lora"}, "other.layers.0"),
        ({"layers.0": "full", "sublayers.0": "frozen"}, "sublayers.0"),
        ({"layers.0": "lora", "sublayers.0": "frozen"}, None),  # told apart at the dot
        ({"layers.0": "lora", "other.layers.0": "full"}, None),  # full goes first
        ({"model.layers.1": "full", "model.layers.11": "lora"}, None),
    ],
)
def test_names_that_peft_cannot_tell_apart_are_noticed(make_model, plan_for, modes, name):
    plan = plan_for(make_model("llama"))
    named = [dataclasses.replace(plan.candidates[0], name=key, mode=mode) for key, mode in modes.items()]
    plan = dataclasses.replace(plan, candidates=tuple(named))
    if name is None:
        assert plan.to_peft_config().modules_to_save == (list(plan.full_modules) or None)
    else:
        with pytest.raises(PlanError, match=rf'PEFT would not leave {name} "{modes[name]}", since its name ends like'):
            plan.to_peft_config()


def test_a_plan_that_trains_nothing_is_refused(make_model, plan_for):
    plan = plan_for(make_model("llama"))
    frozen = tuple(dataclasses.replace(module, mode="frozen") for module in plan.candidates)
    with pytest.raises(PlanError, match="leaves all modules frozen"):
        dataclasses.replace(plan, candidates=frozen).to_peft_config()


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl: pip install 'hybrid-lightning[test]'")
@pytest.mark.parametrize("share", SHARES)
def test_trl_trains_it(plan_for, share, tmp_path):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    base = AutoModelForCausalLM.from_pretrained(embedded_policy_path())
    plan = plan_for(base, ModuleBudget(share))
    settings = GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        learning_rate=1e-3,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        beta=0.1,  # a reference policy: the adapter switched off
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=base,
        args=settings,
        reward_funcs=lambda completions, **_: [float(text.count("1")) for text in completions],
        train_dataset=Dataset.from_dict({"prompt": [f"{n}*7=" for n in range(100, 132)]}),
        processing_class=AutoTokenizer.from_pretrained(embedded_policy_path()),
        peft_config=plan.to_peft_config(),
    )
    assert sum(parameter.numel() for parameter in trained(trainer.model).values()) == plan.trainable_parameters()
    start = {name: parameter.detach().clone() for name, parameter in trained(trainer.model).items()}
    trainer.train()
    assert trainer.state.global_step == 2
    changed = {name for name, parameter in trained(trainer.model).items() if not torch.equal(parameter, start[name])}
    assert {name for name in start if ".lora_A." not in name} == {name for name in changed if ".lora_A." not in name}
