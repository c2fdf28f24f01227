"""From scores to a plan."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from hybrid_lightning.adapters import plan_json
from hybrid_lightning.adapters.budgets import Budget
from hybrid_lightning.adapters.candidates import linear_shape
from hybrid_lightning.adapters.lora import LoraSettings
from hybrid_lightning.adapters.plan import AdapterPlan, PlannedModule
from hybrid_lightning.parts import Part, to_plain


def make_plan(
    *,
    model: str,
    model_digest: str,
    candidates: Mapping[str, nn.Module],
    budget: Budget,
    lora: LoraSettings,
    scores: Mapping[str, float] | None = None,
    scorer: Part | None = None,
    revision: str | None = None,
    calibration: Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> AdapterPlan:
    """Spend the budget on the candidates with the highest scores; all others get LoRA.

    Args:
        model: id or path of the base model.
        model_digest: of the base model, as `model_digest` gives it.
        candidates: full dotted name -> linear module.
        budget: how many modules are fully trained.
        lora: settings for the other modules.
        scores: full dotted name -> score; None only where the budget does not need any (`Budget.needs_scores`).
        scorer: made the scores.
        revision: of a hub model.
        calibration: what the scores were made from, in plain types; kept for the reader.
        seed: of the calibration.

    Raises:
        ConfigError: if the budget needs scores that are missing, or is too small for any module.
    """
    scores = {} if scores is None else scores
    modules = [
        PlannedModule(
            name=name,
            shape=linear_shape(module),
            parameters=_parameters(module),
            score=None if name not in scores else float(scores[name]),
            mode="lora",
        )
        for name, module in candidates.items()
    ]
    full = budget.choose(modules, lora)
    return AdapterPlan(
        model=model,
        revision=revision,
        model_digest=model_digest,
        candidates=tuple(replace(module, mode="full") if module.name in full else module for module in modules),
        lora=lora,
        budget=describe(budget),
        scorer=None if scorer is None else describe(scorer),
        calibration=plan_json.plain(to_plain(dict(calibration or {}))),
        seed=seed,
    )


def _parameters(module: nn.Module) -> int:
    outputs, inputs = linear_shape(module)
    return outputs * inputs + (0 if getattr(module, "bias", None) is None else outputs)


def describe(part: Part) -> dict[str, Any]:
    """Like `Part.to_config`, with the arguments that were left at their defaults written out, in plain types."""
    config = part.to_config()
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(type(part).__init__).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    config["init_args"] = to_plain({**defaults, **config["init_args"]})
    plain: dict[str, Any] = plan_json.plain(config)
    return plain
