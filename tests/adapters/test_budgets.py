"""Which modules budgets choose, and the plans made of scores and a budget."""

from dataclasses import replace

import pytest

from hybrid_lightning.adapters import LoraSettings, ModuleBudget, ParameterBudget, Random, find_candidates, make_plan
from hybrid_lightning.adapters.budgets import ModuleScores
from hybrid_lightning.adapters.plan import PlannedModel, PlannedModule
from hybrid_lightning.errors import ConfigError, PlanError

BASE = PlannedModel("tiny", "0")


def module(name: str, score: float | None, parameters: int = 256, **more) -> PlannedModule:
    return PlannedModule(name, (16, parameters // 16), parameters, score, **{"mode": "lora", **more})


@pytest.mark.parametrize(
    ("share", "candidates", "full"),
    [(0.1, 28, 3), (0.1, 14, 1), (0.1, 4, 1), (0.5, 3, 2), (0, 28, 0), (1, 28, 28), (0.1, 196, 20)],
)
def test_module_budget_rounds(share, candidates, full):
    modules = [module(f"layers.{i}", float(i)) for i in range(candidates)]
    chosen = ModuleBudget(share).choose(modules, LoraSettings())
    assert chosen == {f"layers.{i}" for i in range(candidates - full, candidates)}


def test_of_equal_scores_the_name_decides():
    modules = [module(name, 1.0) for name in "dbca"]
    assert ModuleBudget(0.5).choose(modules, LoraSettings()) == {"a", "b"}
    assert ParameterBudget(0.5).choose(modules, LoraSettings(rank=1)) == {"a", "b"}


def test_parameter_budget_by_hand_and_with_ranks_that_differ():
    """Extra parameters at rank 1: 256 - 32 = 224 of the small, 1024 - 80 = 944 of the large modules."""
    modules = [module("small", 224.0), module("large", 2 * 944.0, 1024), module("poor", 1.0), module("rest", 1.0, 1024)]
    total = 2560
    for parameters, chosen in [(1024, {"large"}), (1279, {"large"}), (1280, {"large", "small"})]:
        assert ParameterBudget(parameters / total).choose(modules, LoraSettings(rank=1)) == chosen
    with pytest.raises(ConfigError, match=r"allows 1023 .*first module by score, large, has 1024; raise the share"):
        ParameterBudget(1023.5 / total).choose(modules, LoraSettings(rank=1))
    # At rank 4 full training of `small` costs 64 more than LoRA and of `other` 192, at rank 8 of `other` nothing more
    small, other = module("small", 1.0), module("other", 1.5)
    budget, lora = ParameterBudget(0.5), LoraSettings(rank=4)
    assert budget.choose([replace(small, rank=6), replace(other, rank=2)], lora) == {"small"}
    assert budget.choose([replace(small, rank=6), replace(other, rank=8)], lora) == {"other"}
    assert budget.choose([replace(small, mode="frozen", score=2.0), other], lora) == {"other"}, "it would have no LoRA"
    # Modules that cost no more than LoRA come first.
    assert budget.choose([module("tiny", 1.0, 32), module("large", 1e9, 1024)], LoraSettings(rank=8)) == {"tiny"}


def test_budgets_say_what_they_need():
    with pytest.raises(ConfigError, match=r"share=1\.5"):
        ModuleBudget(1.5)
    with pytest.raises(ConfigError, match="needs a score for b"):
        ModuleBudget(0.5).choose([module("a", 1.0), module("b", None)], LoraSettings())
    assert [ModuleBudget(share).needs_scores for share in (0, 0.1, 1)] == [False, True, False]
    assert ParameterBudget(1).choose([module("a", None)], LoraSettings()) == {"a"}


# ---- making plans


def test_a_plan_records_settings_left_at_their_defaults(make_model):
    candidates = find_candidates(make_model("llama"))
    scores = ModuleScores(scorer=Random(), calibration={"signal": "reward"})
    plan = make_plan(BASE, candidates, ModuleBudget(1), LoraSettings(), scores)
    assert plan.scorer == {"class_path": "hybrid_lightning.adapters.Random", "init_args": {"seed": 0}}
    assert plan.budget["init_args"] == {"share": 1} and plan.candidates[0].score is None and plan.lora_modules == ()
    with pytest.raises(ConfigError, match="needs a score"):
        make_plan(BASE, candidates, ModuleBudget(), LoraSettings())
    with pytest.raises(PlanError, match="infinite"):
        make_plan(BASE, candidates, ModuleBudget(1), LoraSettings(), ModuleScores(calibration={"reward": float("inf")}))


def test_a_plan_holds_the_ranks_that_differ(plan_for, make_model):
    plan = plan_for(make_model("llama"), ranks={"attention": 1, "o_proj": 0, "gate_proj": 4})
    ranks = {module.name.removeprefix("model.layers."): (module.mode, module.rank) for module in plan.candidates}
    assert ranks["0.self_attn.q_proj"] == ("lora", 1) and ranks["0.self_attn.o_proj"] == ("frozen", None)
    assert ranks["1.self_attn.v_proj"] == ("full", None)
    assert ranks["0.mlp.gate_proj"] == ("lora", None) and plan.ranks == (1, 4), "the plan's own rank does not count as different"
    assert plan_for(make_model("llama"), ranks={"mlp": 4, "attention": 4}) == plan_for(make_model("llama"))
