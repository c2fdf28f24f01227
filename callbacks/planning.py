"""`Planner`: makes the adapter plan of a run, for every LightningModule that follows the protocol `Adaptable`.

    candidates -> losses at the start policy -> scores -> what the budget trains fully -> plan

Ranks of FSDP2 score together; otherwise the first rank scores, and the others get its plan or its error, so that none waits.
"""

from collections.abc import Iterable, Mapping, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from hybrid_lightning.adapters.budgets import Budget, ModuleScores, make_plan, plan_of_budget
from hybrid_lightning.adapters.candidates import find_candidates, ranks_by_pattern
from hybrid_lightning.adapters.gradients import GradientMode
from hybrid_lightning.adapters.lora_settings import LoraSettings, check_lora_modules
from hybrid_lightning.adapters.plan import AdapterPlan, PlannedModel, model_digest
from hybrid_lightning.adapters.scorers import Scorer
from hybrid_lightning.adapters.scoring import Scoring
from hybrid_lightning.adapters.scoring_process import ScoringProcess
from hybrid_lightning.adapters.scoring_progress import SCORING, ScoringProgress
from hybrid_lightning.adapters.updates import OptimizerSteps, turns_of
from hybrid_lightning.callbacks.display import console, progress_bar, say
from hybrid_lightning.engine import Backend
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.model.precision import evaluation_mode
from hybrid_lightning.sharding.fsdp2 import FSDP2Strategy
from hybrid_lightning.sharding.ranks import on_all_ranks
from hybrid_lightning.stopping import RunStopped, StopSignals
from hybrid_lightning.training.adaptation import AdaptedModule
from hybrid_lightning.training.language import LanguageModule
from hybrid_lightning.training.optim import make_optimizer
from hybrid_lightning.training.sharded_scoring import SharedProgress, scored_together

# Of the losses of scoring in float16: gradients below 1.5e-11 are 0 then, and not those below 6e-8. One that a larger scale took
# out of float16's range would be refused as not finite.
_LOSS_SCALE = 2.0**12


@runtime_checkable
class Adaptable(Protocol):
    """What a LightningModule must have to be adapted, be it a policy or a module for supervised or preference training."""

    adapter_attribute: str  # name of the attribute that holds the model

    def calibration_losses(self, num_prompts: int | None) -> Iterable[Tensor]:
        """Scalar losses of the start policy, computed anew each time: modules are scored by the mean of their gradients.

        None leaves the number of prompts (or examples) to the module, which should take about as many as one training step has.
        If the iterable has an attribute `info` (a dict of plain values), it is kept in the plan.
        """
        ...


def check_adaptable(pl_module: LightningModule) -> None:
    """Check that a module follows the protocol, and build its model if that is done in `configure_model`."""
    name = type(pl_module).__name__
    if not isinstance(pl_module, Adaptable):
        raise ConfigError(
            f"HybridAdapterSetup cannot adapt {name}; give it an attribute adapter_attribute (the name of the model's "
            "attribute) and a method calibration_losses(num_prompts)"
        )
    attribute = pl_module.adapter_attribute
    if not isinstance(getattr(pl_module, attribute, None), nn.Module):
        pl_module.configure_model()  # only if there is no model yet: this hook may also split a model over processes
    if not isinstance(getattr(pl_module, attribute, None), nn.Module):
        raise ConfigError(
            f"{name}.adapter_attribute is {attribute!r}, but there is no such module; give the name of the attribute that holds "
            "the model"
        )


def model_of(pl_module: LightningModule) -> nn.Module:
    """The model of a module that follows the protocol: what its `adapter_attribute` names."""
    model = getattr(pl_module, str(pl_module.adapter_attribute))
    assert isinstance(model, nn.Module)
    return model


def applied_plan(pl_module: LightningModule) -> AdapterPlan | None:
    """The plan by which a module is adapted; a module that knows none gets the attribute from `HybridAdapterSetup`."""
    plan = getattr(pl_module, "plan", None)
    return plan if isinstance(plan, AdapterPlan) else None


@dataclass(frozen=True)
class Planning:
    """How a plan is made."""

    budget: Budget  # chooses the fully trained modules by their scores
    scorer: Scorer
    gradients: GradientMode  # how gradients are held while scoring
    lora: LoraSettings  # of the modules that are not fully trained
    rank_pattern: Mapping[str, int]  # ranks of modules that have not that of `lora`
    target_modules: Sequence[str] | None  # candidates by the end of their names; None takes all
    calibration_prompts: int | None  # None lets the module choose

    def candidates(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """The modules that may be trained: full dotted name -> linear module; ModelError if there are none."""
        return find_candidates(model, target_modules=self.target_modules)

    def ranks(self, candidates: Iterable[str]) -> dict[str, int]:
        """Rank of each candidate as LoRA; ModelError if `rank_pattern` matches none."""
        ranks = ranks_by_pattern(candidates, self.rank_pattern, self.lora.rank)
        if self.budget.share == 0 and not any(ranks.values()):
            raise ConfigError("adapter.rank_pattern freezes all modules, and the budget trains none of them fully; raise a rank")
        return ranks


@dataclass(frozen=True)
class Planner:
    """Makes the plan of a run."""

    planning: Planning
    trainer: Trainer
    module: LightningModule  # what is trained, not adapted yet (see `Adaptable`)
    folder: Path | None  # of the run, in which scores are saved as they are found; None saves nothing
    earlier: Path | None  # of scores that a stopped run has saved, to go on from; None starts from nothing

    @property
    def _language(self) -> LanguageModule | None:
        return self.module if isinstance(self.module, LanguageModule) else None

    def plan(self) -> AdapterPlan:
        """Score the modules where the budget needs that, and choose. All ranks have to call it, and get the same plan.

        Modules that cannot be scored are a CalibrationError on all, and a signal to one of them stops all.
        """
        trainer = self.trainer
        content: Any
        if trainer.world_size == 1:
            content = self._make().to_dict()
        elif isinstance(trainer.strategy, FSDP2Strategy) and self._language is not None:
            content = trainer.strategy.broadcast(self._make(trainer.strategy).to_dict())
        else:
            signals = StopSignals() if self._language is None else self._language.signals

            def make() -> Any:
                try:
                    return self._make().to_dict() if trainer.is_global_zero else None
                except RunStopped as stopped:
                    signals.requested = stopped.number  # the module may not have the signals that have stopped it
                    raise

            content = on_all_ranks(make, signals, "score the modules")[0]
        return AdapterPlan.from_dict(content)

    def _make(self, splits: FSDP2Strategy | None = None) -> AdapterPlan:
        """The plan, with scores by all ranks of a strategy that splits the model, or by this process alone."""
        planning, model = self.planning, model_of(self.module)
        if splits is None:
            model.to(self.trainer.strategy.root_device)
        digest = self.module.base_digest if isinstance(self.module, AdaptedModule) else model_digest(model)
        candidates = planning.candidates(model)
        ranks, arguments = planning.ranks(candidates), self.module.hparams
        if planning.budget.share < 1:
            check_lora_modules(model, (name for name, rank in ranks.items() if rank))
        scores = ModuleScores(seed=arguments.get("seed"))
        if planning.budget.needs_scores:
            scores = self._score(candidates, ranks, digest, splits)
        base = PlannedModel(str(arguments.get("model", type(model).__name__)), digest, arguments.get("revision"))
        return make_plan(base, candidates, planning.budget, planning.lora, scores, ranks)

    # ---- scoring

    def _score(
        self, candidates: Mapping[str, nn.Module], ranks: Mapping[str, int], digest: str, splits: FSDP2Strategy | None
    ) -> ModuleScores:
        if not self.planning.scorer.needs_calibration:
            splits = None  # the weights alone, which every rank has, or not even these
        folder = self.folder / SCORING if self.folder is not None and self.trainer.is_global_zero else None
        kind = ScoringProgress if splits is None else SharedProgress
        progress = kind(folder, self.earlier, None if self._language is None else self._language.signals)
        progress.require({"model": digest, "modules": list(candidates)})
        if splits is None or self._language is None:
            together: Any = nullcontext(ScoringProcess(progress))
        else:
            together = scored_together(self._language, splits, candidates, progress)
        with together as process:
            if self.trainer.precision == "16-mixed":
                process.loss_scale = _LOSS_SCALE
            return self._score_with(process, candidates, ranks)

    def _score_with(self, process: ScoringProcess, candidates: Mapping[str, nn.Module], ranks: Mapping[str, int]) -> ModuleScores:
        from hybrid_lightning.engine import use_fused_layers  # PEFT is slow to import

        planning, scorer, model = self.planning, self.planning.scorer, model_of(self.module)
        # Fused layers as in training, since rollouts and passes of scoring are as large as those of training.
        use_fused_layers(model, Backend() if self._language is None else self._language.engine.backend)
        losses: Any = []
        info: dict[str, Any] = {}
        if scorer.needs_calibration:
            losses = self._losses(process.progress)
            info = {"prompts": planning.calibration_prompts, **getattr(losses, "info", {})}
            if info.get("signal") == "answers" and process.is_first:
                console().print(
                    "All calibration rewards of each prompt are equal, so rollouts carry no signal: modules are scored by the "
                    "supervised gradient of the reference answers instead"
                )
        total = len(losses) if isinstance(losses, Sized) else None
        steps = None
        if scorer.needs_update:
            most = plan_of_budget(candidates, planning.budget, planning.lora, planning.rank_pattern).trainable_parameters()
            steps, turns = OptimizerSteps(self._make_optimizer, most), len(turns_of(candidates, most))
            info |= {"turns": turns}
            total = None if total is None else turns * total
            if process.is_first:
                say(f"Scoring by {scorer.steps} optimizer steps that are not taken, in {turns} turns of {most:,} weights")
        with evaluation_mode(model), progress_bar(self.trainer, "Scoring modules", total) as advance:
            process.on_loss = lambda seen: advance(seen, None)
            scores = Scoring(model, candidates, losses, scorer, ranks, planning.gradients, steps).run(process)
        return ModuleScores(scores, scorer, info, self.module.hparams.get("seed"))

    def _losses(self, progress: ScoringProgress) -> Any:
        """The module's calibration losses; a language model saves the rollouts behind them, and shows how they are made."""
        count, scorer, language = self.planning.calibration_prompts, self.planning.scorer, self._language
        if language is None:
            assert isinstance(self.module, Adaptable)
            return self.module.calibration_losses(count)
        with progress_bar(self.trainer, "Calibration rollouts", None) as advance:
            language.generation_listeners.append(listen := lambda running, decoded, total: advance(decoded, total))
            try:
                steps = {"steps": scorer.steps} if scorer.needs_update else {}
                return language.calibration_losses(count, kept=progress, **steps)
            finally:
                language.generation_listeners.remove(listen)

    def _make_optimizer(self, stand_ins: list[nn.Parameter]) -> Optimizer:
        """The run's optimizer at the rate of fully trained modules; of a module that does not say which, AdamW."""
        if not isinstance(self.module, AdaptedModule):
            return AdamW(stand_ins)
        groups = [{"params": stand_ins, "lr": self.module.rates["full"], "name": "full"}]
        return make_optimizer(self.module.optimization.optimizer, groups)
