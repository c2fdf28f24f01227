"""Ranks that differ between modules: by a pattern, in plans, and in the adapted model."""

import json
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from tiny_models import FAMILIES, build_model

from hybrid_lightning.adapters.apply import apply_plan, trainable_state
from hybrid_lightning.adapters.budgets import ModuleBudget, ModuleScores, ParameterBudget, make_plan
from hybrid_lightning.adapters.candidates import find_candidates
from hybrid_lightning.adapters.lora_settings import ADAPTER, LoraSettings
from hybrid_lightning.adapters.plan import AdapterPlan, PlannedModel, PlannedModule
from hybrid_lightning.adapters.plan_display import plan_markdown, plan_title
from hybrid_lightning.adapters.rank_pattern import module_group, ranks_by_pattern
from hybrid_lightning.adapters.scorers import TailEnergy
from hybrid_lightning.adapters.scoring import Scoring
from hybrid_lightning.errors import ConfigError, ModelError, PlanError

LORA = LoraSettings(rank=4, alpha=6)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.0.self_attn.q_proj", "attention"),
        ("transformer.h.3.attn.c_attn", "attention"),
        ("gpt_neox.layers.1.attention.query_key_value", "attention"),
        ("model.layers.0.linear_attn.in_proj_qkvz", "attention"),
        ("model.layers.0.mlp.down_proj", "mlp"),
        ("model.decoder.layers.2.fc1", "mlp"),
        ("model.layers.0.block_sparse_moe.gate", "mlp"),
        ("model.layers.0.feed_forward.w1", "mlp"),
        ("transformer.blocks.0.ffn.up_proj", "mlp"),
        ("backbone.layers.0.mixer.in_proj", None),
    ],
)
def test_groups_of_modules(name, group):
    assert module_group(name) == group


@pytest.mark.parametrize("family", FAMILIES)
def test_all_modules_of_all_families_have_a_group(family):
    groups = [module_group(name) for name in find_candidates(build_model(family))]
    assert set(groups) == {"attention", "mlp"}


def test_the_longest_name_decides():
    names = ["layers.0.self_attn.q_proj", "layers.0.mlp.up_proj", "layers.1.mlp.up_proj", "layers.1.mlp.down_proj", "layers.1.x"]
    pattern = {"1.mlp.up_proj": 2, "mlp": 8, "up_proj": 5, "attention": 0}
    expected = dict(zip(names, [0, 5, 2, 8, 16], strict=True))
    assert ranks_by_pattern(names, pattern, 16) == expected
    assert ranks_by_pattern(names, dict(reversed(pattern.items())), 16) == expected
    assert set(ranks_by_pattern(names, {}, 7).values()) == {7}


@pytest.mark.parametrize("pattern", [{"mlp": -1}, {"mlp": 1.5}, {"mlp": True}, {"mlp": "8"}])
def test_impossible_ranks_are_refused(pattern):
    with pytest.raises(ConfigError, match=r"rank_pattern: mlp=.* must be a whole number"):
        ranks_by_pattern(["layers.0.mlp.up_proj"], pattern, 4)


@pytest.mark.parametrize("key", ["up", "mlps", "_proj", "attention"])
def test_a_key_that_matches_nothing_is_refused(key):
    with pytest.raises(ModelError, match=rf"rank_pattern: '{key}' matches no candidate .*\(it has mlp\)"):
        ranks_by_pattern(["layers.0.mlp.up_proj", "layers.0.mlp.down_proj"], {"mlp": 2, key: 3}, 4)


# ---- in plans


def plan_with(model, ranks, budget=None, lora=LORA):
    candidates = find_candidates(model)
    scores = {name: float(place) for place, name in enumerate(candidates)}
    return make_plan(
        PlannedModel("tiny", "0"),
        candidates,
        budget or ModuleBudget(0.2),
        lora,
        ModuleScores(scores),
        ranks=ranks_by_pattern(candidates, ranks, lora.rank),
    )


def test_a_plan_holds_the_ranks_that_differ():
    model = build_model("llama")
    plan = plan_with(model, {"attention": 1, "o_proj": 0, "gate_proj": 4})
    ranks = {module.name: (module.mode, module.rank) for module in plan.candidates}
    assert ranks["model.layers.0.self_attn.q_proj"] == ("lora", 1)
    assert ranks["model.layers.0.self_attn.o_proj"] == ("frozen", None)
    assert ranks["model.layers.0.mlp.gate_proj"] == ("lora", None), "that of the plan"
    assert ranks["model.layers.1.mlp.down_proj"] == ("full", None)
    assert plan.ranks == (1, 4)
    assert "LoRA of ranks 1 to 4" in plan_title(plan) and "| lora, rank 1 |" in plan_markdown(plan)
    again = AdapterPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan and again.digest == plan.digest and plan.to_dict()["format"] == 1


def test_the_digest_of_a_plan_does_not_change():
    """Digests of plans are in checkpoints."""
    candidates = (PlannedModule("a.b", (4, 3), 12, 0.5, "full"), PlannedModule("a.c", (4, 3), 12, None, "lora"))
    plan = AdapterPlan("tiny", None, "0" * 64, candidates, LORA, {"class_path": "x", "init_args": {}})
    content = plan.to_dict()
    assert content["format"] == 1 and all("rank" not in module for module in content["candidates"])
    assert content["digest"] == "218b1cb95597713fd675d3945d26a4b4de9c7941309c0913390904084af3ecb1"
    assert AdapterPlan.from_dict(content) == plan


def test_a_plan_may_be_edited_by_hand(tmp_path):
    plan = plan_with(build_model("llama"), {})
    content = {**plan.to_dict(), "digest": None}
    content["candidates"][0]["rank"] = 2
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    assert AdapterPlan.load(path).ranks == (2, 4)
    for rank, words in ((0, r'rank is 0: it must be at least 1; for no LoRA make the mode "frozen"'), (1.5, r'"rank" is 1\.5')):
        content["candidates"][0]["rank"] = rank
        path.write_text(json.dumps(content))
        with pytest.raises(PlanError, match=words):
            AdapterPlan.load(path)


def test_a_budget_of_parameters_knows_what_each_rank_costs():
    """At rank 4 full training of `small` costs 64 more than LoRA and of `other` 192, at rank 8 of `other` nothing more."""
    small, other = PlannedModule("small", (16, 16), 256, 1.0, "lora"), PlannedModule("other", (16, 16), 256, 1.5, "lora")
    budget = ParameterBudget(0.5)
    assert budget.choose([replace(small, rank=6), replace(other, rank=2)], LORA) == {"small"}
    assert budget.choose([replace(small, rank=6), replace(other, rank=8)], LORA) == {"other"}
    assert budget.choose([replace(small, mode="frozen"), other], LORA) == {"other"}


@pytest.mark.parametrize("lora", [LORA, replace(LORA, use_rslora=True), replace(LORA, use_dora=True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapted_model_has_the_ranks_and_the_parameters_of_the_plan(family, lora):
    model = build_model(family)
    plan = plan_with(model, {"mlp": 3, "attention": 1}, lora=lora)
    adapted = apply_plan(model, plan)
    layers = dict(adapted.get_base_model().named_modules())
    for module in plan.candidates:
        if module.mode == "lora":
            layer = layers[module.name]
            assert layer.r[ADAPTER] == (3 if module_group(module.name) == "mlp" else 1)
            # alpha / rank stays 1.5; with rsLoRA alpha stays 6.
            assert layer.scaling[ADAPTER] == pytest.approx(6 / layer.r[ADAPTER] ** 0.5 if lora.use_rslora else 1.5)
    assert plan.trainable_parameters() == sum(weight.numel() for weight in trainable_state(adapted).values())


def test_pefts_config_says_the_same():
    model = build_model("llama")
    plan = plan_with(model, {"mlp": 3, "attention": 1})
    theirs = get_peft_model(build_model("llama"), plan.to_peft_config())
    ours = apply_plan(model, plan)
    shapes = [{name: weight.shape for name, weight in trainable_state(side).items()} for side in (theirs, ours)]
    assert shapes[0] == shapes[1]
    config = plan.to_peft_config(rank=5)
    assert (config.r, config.rank_pattern) == (5, {}), "a rank that is given is that of all modules"


def test_a_module_is_scored_at_its_own_rank(batches, losses):
    model = build_model("llama")
    candidates = find_candidates(model)
    names = list(candidates)
    found = {rank: Scoring(model, candidates, losses(model), TailEnergy(), rank).run() for rank in (1, 4)}
    ranks = dict(zip(names, ([1, 4, 0] * len(names))[: len(names)], strict=True))
    mixed = Scoring(model, candidates, losses(model), TailEnergy(), ranks).run()
    for name, rank in ranks.items():
        assert mixed[name] == found[rank][name] if rank else mixed[name] > found[1][name]
    with pytest.raises(ConfigError, match="needs a LoRA rank of at least 1"):
        Scoring(model, candidates, losses(model), TailEnergy(), dict.fromkeys(candidates, 0)).run()


def test_a_model_trains_alike_with_ranks_that_are_all_the_same():
    """A rank of its own that is the plan's is the plan's, to the bit."""
    model, other = build_model("llama"), build_model("llama")
    tokens = torch.arange(3, 19).view(2, 8)
    outputs = []
    for each, ranks in ((model, {}), (other, {"mlp": 4, "attention": 4})):
        torch.manual_seed(0)
        outputs.append(apply_plan(each, plan_with(each, ranks)))
    assert outputs[0].peft_config[ADAPTER].rank_pattern == outputs[1].peft_config[ADAPTER].rank_pattern == {}
    for adapted in outputs:
        adapted(tokens, labels=tokens).loss.backward()
    gradients = [{n: p.grad for n, p in side.named_parameters() if p.grad is not None} for side in outputs]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
