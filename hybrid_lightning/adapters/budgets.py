"""Budgets choose which modules are fully trained; `make_plan` turns scores and a budget into an `AdapterPlan`.

`Planning` has all settings that a plan depends on.

The candidates compete by score, greedily. Ties are broken by name, so that the same scores always give the same plan, and a
larger budget only ever adds modules.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from hybrid_lightning.adapters.candidates import candidate_shape, find_candidates, is_linear, ranks_by_pattern
from hybrid_lightning.adapters.gradients import GradientMode, matrices_of
from hybrid_lightning.adapters.lora_settings import LoraSettings
from hybrid_lightning.adapters.plan import AdapterPlan, PlannedModel, PlannedModule, plain
from hybrid_lightning.adapters.scorers import Scorer
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.shared.configurable import Configurable, constructor_defaults, to_plain


class Budget(Configurable, ABC):
    """Chooses the modules to train fully.

    Args:
        share: Share of the candidates to train fully: 0 is plain LoRA, 1 full fine-tuning of all candidates.
    """

    def __init__(self, share: float = 0.1) -> None:
        if not 0 <= share <= 1:
            raise ConfigError(
                f"share={share} is not a share of the candidates; give one from 0 (plain LoRA) to 1 (full fine-tuning)"
            )
        self.share = share

    @property
    def needs_scores(self) -> bool:
        """Whether the choice depends on scores: with share 0 or 1 it does not."""
        return 0 < self.share < 1

    def choose(self, modules: Sequence[PlannedModule], lora: LoraSettings) -> frozenset[str]:
        """Choose the modules to train fully.

        Args:
            modules: The candidates; their modes are ignored.
            lora: LoRA settings of the modules that are not chosen.

        Returns:
            Full dotted names of the chosen modules.

        Raises:
            ConfigError: If scores are needed and missing, or the budget is too small for any module.
        """
        if self.share == 0:
            return frozenset()
        if self.share == 1:
            return frozenset(module.name for module in modules)
        unscored = [module.name for module in modules if module.score is None]
        if unscored:
            raise ConfigError(f"{type(self).__name__}(share={self.share}) needs a score for {unscored[0]}; score it first")
        return frozenset(self._choose(modules, lora))

    @abstractmethod
    def _choose(self, modules: Sequence[PlannedModule], lora: LoraSettings) -> list[str]:
        """Choose modules for a share strictly between 0 and 1, where all modules have a score."""


class ModuleBudget(Budget):
    """A share of the candidate modules, as in the paper (10%): share times their number, rounded half up, at least one."""

    def _choose(self, modules: Sequence[PlannedModule], lora: LoraSettings) -> list[str]:
        number = max(1, int(self.share * len(modules) + 0.5))
        return [module.name for module in sorted(modules, key=lambda module: (-_score(module), module.name))][:number]


class ParameterBudget(Budget):
    """A share of the candidates' parameters, a limit that is never exceeded.

    Modules are ordered by score per extra trainable parameter (the parameters of the module minus those that LoRA would add to
    it) and taken until the first that no longer fits.
    """

    def _choose(self, modules: Sequence[PlannedModule], lora: LoraSettings) -> list[str]:
        def order(module: PlannedModule) -> tuple[bool, float, str]:
            extra = module.parameters - (0 if module.mode == "frozen" else module.lora(lora).parameters(module.shape))
            # Where LoRA would have at least as many parameters, full training costs nothing: such modules come first, by score.
            return (extra > 0, -_score(module) / max(extra, 1), module.name)

        limit = self.share * sum(module.parameters for module in modules)
        chosen: list[str] = []
        used = 0
        ordered = sorted(modules, key=order)
        for module in ordered:
            used += module.parameters
            if used > limit * (1 + 1e-9):
                break
            chosen.append(module.name)
        if not chosen:
            first = ordered[0]
            raise ConfigError(
                f"share={self.share} allows {int(limit)} fully trained parameters, but the first module by score, "
                f"{first.name}, has {first.parameters}; raise the share, or use a ModuleBudget"
            )
        return chosen


@dataclass(frozen=True)
class ModuleScores:
    """Scores of modules and the calibration that they come from, which a plan keeps for its readers."""

    values: Mapping[str, float] = field(default_factory=dict)  # full dotted name -> score; empty where nothing was scored
    scorer: Configurable | None = None  # None: nothing was scored
    calibration: Mapping[str, Any] = field(default_factory=dict)  # in plain types
    seed: int | None = None  # of the calibration


def make_plan(
    base: PlannedModel,
    candidates: Mapping[str, nn.Module],
    budget: Budget,
    lora: LoraSettings,
    scores: ModuleScores | None = None,
    ranks: Mapping[str, int] | None = None,
) -> AdapterPlan:
    """Make a plan: the budget chooses the fully trained modules among the candidates, and all others get LoRA.

    Args:
        base: Names the model that the plan is for.
        candidates: Full dotted name -> module, as from `find_candidates`.
        budget: Chooses the fully trained modules.
        lora: LoRA settings of the other modules.
        scores: Scores of all candidates; None only where the budget does not need any (`Budget.needs_scores`).
        ranks: Full dotted name -> LoRA rank where it differs from the rank of `lora`; 0 freezes a module that is not fully
            trained.

    Raises:
        ConfigError: If the budget needs scores that are missing, or is too small for any module.
    """
    scores, ranks = scores or ModuleScores(), ranks or {}
    modules = []
    for name, module in candidates.items():
        rank, shape = ranks.get(name, lora.rank), candidate_shape(module)
        parameters = sum(parameter.numel() for parameter in module.parameters())
        score = None if name not in scores.values else float(scores.values[name])
        own = None if rank in (0, lora.rank) else rank
        modules.append(PlannedModule(name, shape, parameters, score, "lora" if rank else "frozen", own))
    full = budget.choose(modules, lora)
    return AdapterPlan(
        model=base.model,
        revision=base.revision,
        model_digest=base.digest,
        candidates=tuple(replace(module, mode="full", rank=None) if module.name in full else module for module in modules),
        lora=lora,
        budget=config_with_defaults(budget),
        scorer=None if scores.scorer is None else config_with_defaults(scores.scorer),
        calibration=plain(to_plain(dict(scores.calibration))),
        seed=scores.seed,
    )


def plan_of_budget(
    candidates: Mapping[str, nn.Module], budget: Budget, lora: LoraSettings, rank_pattern: Mapping[str, int] | None = None
) -> AdapterPlan:
    """The plan if the largest modules have the highest scores, so that the budget trains as much as it can."""
    sizes = {name: float(sum(w.numel() for w in matrices_of(module).values())) for name, module in candidates.items()}
    ranks = ranks_by_pattern(candidates, rank_pattern or {}, lora.rank)
    return make_plan(PlannedModel("", ""), candidates, budget, lora, ModuleScores(sizes), ranks)


def config_with_defaults(part: Configurable) -> dict[str, Any]:
    """Like `Configurable.to_config`, but with arguments left at their defaults written out too, in plain types."""
    config = part.to_config()
    config["init_args"] = to_plain({**constructor_defaults(type(part)), **config["init_args"]})
    found: dict[str, Any] = plain(config)
    return found


def _score(module: PlannedModule) -> float:
    assert module.score is not None
    return module.score


@dataclass(frozen=True)
class Planning:
    """The settings that determine a plan."""

    budget: Budget  # chooses the fully trained modules by their scores
    scorer: Scorer
    gradients: GradientMode  # how gradients are held while scoring
    lora: LoraSettings  # for modules that are not fully trained
    rank_pattern: Mapping[str, int]  # ranks of modules that differ from the rank of `lora`
    target_modules: Sequence[str] | None  # candidates by the end of their names; None takes all
    calibration_prompts: int | None  # None lets the module choose

    def candidates(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """The trainable candidates: full dotted name -> module; ModelError if there are none."""
        return find_candidates(model, self.target_modules, self.rank_pattern)

    def ranks(self, candidates: Mapping[str, nn.Module]) -> dict[str, int]:
        """LoRA rank of each candidate; ModelError if `rank_pattern` matches none, ConfigError if experts cannot have the rank."""
        ranks = ranks_by_pattern(candidates, self.rank_pattern, self.lora.rank)
        if self.budget.share < 1 and any(ranks[name] and not is_linear(module) for name, module in candidates.items()):
            self.lora.check_experts()
        if self.budget.share == 0 and not any(ranks.values()):
            raise ConfigError("adapter.rank_pattern freezes all modules, and the budget trains none of them fully; raise a rank")
        return ranks
