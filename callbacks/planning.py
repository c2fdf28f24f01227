"""`Planner`: makes the adapter plan of a run, for every LightningModule that follows the protocol `Adaptable`.

    candidates -> losses at the start policy -> scores -> what the budget trains fully -> plan

Ranks of FSDP2 score together. With other strategies the first rank scores, and the others get its plan or its error, so that none
waits.
"""

from collections.abc import Iterable, Mapping, Sized
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from hybrid_lightning.adapters.budgets import ModuleScores, Planning, make_plan
from hybrid_lightning.adapters.plan import AdapterPlan, PlannedModel, model_digest
from hybrid_lightning.adapters.scoring import Scoring
from hybrid_lightning.callbacks.display import console, progress_bar
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.model.precision import evaluation_mode
from hybrid_lightning.runner import Backend
from hybrid_lightning.sharding.fsdp2 import FSDP2Strategy
from hybrid_lightning.sharding.ranks import on_all_ranks
from hybrid_lightning.shared.stopping import RunStopped, StopSignals
from hybrid_lightning.training.module import LanguageModule
from hybrid_lightning.training.policy_module import PolicyModule
from hybrid_lightning.training.sharded_scoring import ShardedScoring, split_copy

# Scale of scoring's losses in float16: gradients below 1.5e-11 become 0, instead of those below 6e-8. A gradient that a larger
# scale took out of float16's range would be refused as not finite.
_LOSS_SCALE = 2.0**12


@runtime_checkable
class Adaptable(Protocol):
    """What a LightningModule must have to be adapted: a policy, or a module for supervised or preference training."""

    adapter_attribute: str  # name of the attribute that holds the model

    def calibration_losses(self, num_prompts: int | None) -> Iterable[Tensor]:
        """Scalar losses of the start policy, computed during iteration: the mean of their gradients scores the modules.

        With None the module chooses the number of prompts (or examples); it should be about the number in one training step.
        If the iterable has an attribute `info` (a dict of plain values), it is kept in the plan.
        """


def check_adaptable(pl_module: LightningModule) -> None:
    """Check that a module follows the protocol, and build its model if `configure_model` does that."""
    if not isinstance(pl_module, Adaptable):
        raise ConfigError(
            f"HybridAdapterSetup cannot adapt {type(pl_module).__name__}; give it an attribute adapter_attribute (the name of "
            "the model's attribute) and a method calibration_losses(num_prompts)"
        )
    if not isinstance(getattr(pl_module, pl_module.adapter_attribute, None), nn.Module):
        pl_module.configure_model()  # only without a model: this hook may also split a model over processes


def model_of(pl_module: LightningModule) -> nn.Module:
    """The model of a module that follows the protocol, found by its `adapter_attribute`."""
    model = getattr(pl_module, str(pl_module.adapter_attribute))
    assert isinstance(model, nn.Module)
    return model


def applied_plan(pl_module: LightningModule) -> AdapterPlan | None:
    """The plan of an adapted module; `HybridAdapterSetup` sets the attribute on a module that has none."""
    plan = getattr(pl_module, "plan", None)
    return plan if isinstance(plan, AdapterPlan) else None


@dataclass(frozen=True)
class Planner:
    """Makes the plan of a run."""

    planning: Planning
    trainer: Trainer
    module: LightningModule  # the module to train, not adapted yet (see `Adaptable`)

    @property
    def _language(self) -> LanguageModule | None:
        return self.module if isinstance(self.module, LanguageModule) else None

    def plan(self) -> AdapterPlan:
        """Score the modules if the budget needs it, and choose. All ranks must call this, and get the same plan.

        Modules that cannot be scored raise a CalibrationError on all ranks, and a signal to one rank stops all.
        """
        trainer = self.trainer
        content: Any
        if trainer.world_size == 1:
            content = self._make().to_dict()
        elif isinstance(trainer.strategy, FSDP2Strategy) and self._language is not None:
            content = trainer.strategy.broadcast(self._make(trainer.strategy).to_dict())
        else:
            signals = StopSignals() if self._language is None else self._language.run.signals

            def make() -> Any:
                try:
                    return self._make().to_dict() if trainer.is_global_zero else None
                except RunStopped as stopped:
                    signals.request(stopped.number)  # the module may not have the signals that stopped it
                    raise

            content = on_all_ranks(make, signals, "score the modules")[0]
        return AdapterPlan.from_dict(content)

    def _make(self, splits: FSDP2Strategy | None = None) -> AdapterPlan:
        """The plan, with scores by all ranks of a strategy that splits the model, or by this process alone."""
        planning, model = self.planning, model_of(self.module)
        if splits is None:
            model.to(self.trainer.strategy.root_device)
        digest = self.module.policy.base_digest if isinstance(self.module, LanguageModule) else model_digest(model)
        candidates = planning.candidates(model)
        ranks, arguments = planning.ranks(candidates), self.module.hparams
        scores = ModuleScores(seed=arguments.get("seed"))
        if planning.budget.needs_scores:
            scores = self._score(candidates, ranks, splits)
        base = PlannedModel(str(arguments.get("model", type(model).__name__)), digest, arguments.get("revision"))
        return make_plan(base, candidates, planning.budget, planning.lora, scores, ranks)

    # ---- scoring

    def _score(self, candidates: Mapping[str, nn.Module], ranks: Mapping[str, int], splits: FSDP2Strategy | None) -> ModuleScores:
        from hybrid_lightning.runner import use_fused_layers  # PEFT is slow to import

        planning, scorer, language = self.planning, self.planning.scorer, self._language
        losses: Any = []
        info: dict[str, Any] = {}
        with ExitStack() as stack:
            if splits is None or language is None or not scorer.needs_gradient:  # only weights are needed, which every rank has
                model, make_scoring = model_of(self.module), Scoring
                # Fused layers as in training, since the rollouts and passes of scoring are just as large.
                use_fused_layers(model, Backend() if language is None else language.policy.runner.backend)
            else:
                model = stack.enter_context(split_copy(language.task, splits))
                make_scoring = partial(ShardedScoring, signals=language.run.signals)  # type: ignore[assignment]
            if scorer.needs_gradient:
                losses = self._losses()
                info = {"prompts": planning.calibration_prompts, **getattr(losses, "info", {})}
            scale = _LOSS_SCALE if self.trainer.precision == "16-mixed" else 1.0
            scoring = make_scoring(model, candidates, losses, scorer, ranks, planning.gradients, scale)
            total = len(losses) if isinstance(losses, Sized) else None
            with evaluation_mode(model), progress_bar(self.trainer, "Scoring modules", total) as advance:
                scores = scoring.run(lambda seen: advance(seen, None))
        return ModuleScores(scores, scorer, info, self.module.hparams.get("seed"))

    def _losses(self) -> Any:
        """The module's calibration losses; for a language model the progress bar shows how their rollouts are made."""
        count, language = self.planning.calibration_prompts, self._language
        if language is None:
            assert isinstance(self.module, Adaptable)
            return self.module.calibration_losses(count)
        description = "Calibration rollouts" if isinstance(language, PolicyModule) else "Calibration examples"
        with progress_bar(self.trainer, description, None) as advance:
            language.run.listeners.append(listen := lambda running, decoded, total: advance(decoded, total))
            try:
                losses = language.calibration_losses(count)
            finally:
                language.run.listeners.remove(listen)
        if losses.info.get("signal") == "answers" and self.trainer.is_global_zero:
            console().print(
                "All calibration rewards of each prompt are equal, so rollouts carry no signal: modules are scored by the "
                "supervised gradient of the reference answers instead"
            )
        return losses
