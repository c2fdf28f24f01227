"""Models and plans that do not fit together are refused."""

import dataclasses

import pytest
from torch import nn

from hybrid_lightning.adapters.apply import apply_plan
from hybrid_lightning.adapters.budgets import ModuleBudget
from hybrid_lightning.errors import ModelError, PlanError


def test_an_adapted_model_is_refused(make_model, plan_for):
    model = make_model("llama")
    plan = plan_for(model)
    adapted = apply_plan(model, plan)
    for again in (adapted, adapted.get_base_model(), nn.ModuleList([adapted])):
        with pytest.raises(ModelError, match="already carries"):
            apply_plan(again, plan)


def test_another_model_is_refused(make_model, plan_for):
    with pytest.raises(PlanError, match="no such module"):
        apply_plan(make_model("gpt2"), plan_for(make_model("llama")))


class TwoTowers(nn.Module):
    """Two stacks, the name of one ending like that of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.other = nn.Module()
        self.other.layers = nn.ModuleList([nn.Linear(4, 4)])

    def prepare_inputs_for_generation(self) -> None: ...


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("listed", [True, False])
def test_names_that_peft_cannot_tell_apart_are_noticed(plan_for, mode, listed):
    """Whether or not the plan knows both modules."""
    model = TwoTowers()
    plan = plan_for(model, ModuleBudget(0.3))
    modes = {"layers.0": mode, "layers.1": "lora", "other.layers.0": "frozen"}
    candidates = tuple(dataclasses.replace(m, mode=modes[m.name]) for m in plan.candidates if listed or "other" not in m.name)
    message = r"PEFT would not leave other\.layers\.0" if listed else r"difference starts with other\.layers\.0"
    with pytest.raises(PlanError, match=message):
        apply_plan(model, dataclasses.replace(plan, candidates=candidates))
