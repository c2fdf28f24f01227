"""Hybrid-LoRA adapters: score the candidate modules, plan which are fully trained, apply the plan with PEFT, show it."""

from typing import TYPE_CHECKING

from hybrid_lightning.adapters.gradients import ExactGradients, GradientMode
from hybrid_lightning.adapters.lora_settings import LoraSettings
from hybrid_lightning.adapters.scorers import (
    GradientNorm,
    PreconditionedTail,
    Random,
    Scorer,
    TailEnergy,
    TailFraction,
)
from hybrid_lightning.adapters.scoring import Scoring
from hybrid_lightning.adapters.sketch import SketchedGradients
from hybrid_lightning.configurable import public_names

if TYPE_CHECKING:
    from hybrid_lightning.adapters.apply import adapter_disabled, apply_plan
    from hybrid_lightning.adapters.budgets import Budget, ModuleBudget, ParameterBudget, make_plan
    from hybrid_lightning.adapters.candidates import find_candidates
    from hybrid_lightning.adapters.plan import AdapterPlan, PlannedModule

__all__ = [
    "AdapterPlan",
    "Budget",
    "ExactGradients",
    "GradientMode",
    "GradientNorm",
    "LoraSettings",
    "ModuleBudget",
    "ParameterBudget",
    "PlannedModule",
    "PreconditionedTail",
    "Random",
    "Scorer",
    "Scoring",
    "SketchedGradients",
    "TailEnergy",
    "TailFraction",
    "adapter_disabled",
    "apply_plan",
    "find_candidates",
    "make_plan",
]

__getattr__ = public_names(  # of what waits for transformers or PEFT
    __name__,
    {
        "apply": ["apply_plan", "adapter_disabled"],
        "budgets": ["Budget", "ModuleBudget", "ParameterBudget", "make_plan"],
        "candidates": ["find_candidates"],
        "plan": ["AdapterPlan", "PlannedModule"],
    },
)
