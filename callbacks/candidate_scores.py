"""The scores of a module's candidates: calibration rollouts, then gradients or optimizer steps, then one number for each."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from hybrid_lightning.adapters.gradients import GradientMode
from hybrid_lightning.adapters.scorers import Scorer
from hybrid_lightning.adapters.scores import score_modules
from hybrid_lightning.adapters.scoring_process import ScoringProcess
from hybrid_lightning.adapters.scoring_progress import ScoringProgress
from hybrid_lightning.adapters.updates import OptimizerSteps, turns_of
from hybrid_lightning.callbacks.display import console, progress_bar, say
from hybrid_lightning.engine import Backend
from hybrid_lightning.policy.adaptation import AdaptedModule
from hybrid_lightning.policy.language import LanguageModule
from hybrid_lightning.policy.modes import evaluation_mode
from hybrid_lightning.policy.module import PolicyModule
from hybrid_lightning.policy.optim import make_optimizer


@dataclass(frozen=True)
class Scoring:
    """How candidates are scored."""

    scorer: Scorer
    gradients: GradientMode  # how gradients are held
    ranks: dict[str, int]  # full dotted name -> LoRA rank
    calibration_prompts: int | None  # None lets the module choose
    trainable: int  # most parameters that the plan can train; read where the scorer looks at updates


def score_candidates(
    scoring: Scoring,
    trainer: Trainer,
    pl_module: LightningModule,
    model: nn.Module,
    candidates: dict[str, Any],
    kept: ScoringProgress,
    process: ScoringProcess | None = None,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Score the candidates.

    Args:
        scoring: How.
        trainer: That of the run.
        pl_module: What is trained.
        model: Its model, not adapted yet.
        candidates: Full dotted name -> linear module.
        kept: Progress of scoring.
        process: Shares the work with other processes; None: this one is alone.

    Returns:
        Full dotted name -> score, and what the scores were made from, which the plan keeps.
    """
    from hybrid_lightning.engine import use_fused_layers  # PEFT is slow to import

    scorer, process = scoring.scorer, process or ScoringProcess()
    # Fused layers as in training, since rollouts and passes of scoring are as large as those of training.
    engine = getattr(pl_module, "engine", None)
    use_fused_layers(model, Backend() if engine is None else engine.backend)
    losses: Any = []
    info: dict[str, Any] = {}
    if scorer.needs_gradient or scorer.needs_loss or scorer.needs_update:
        losses = _calibration_losses(scoring, trainer, pl_module, kept)
        info = {"prompts": scoring.calibration_prompts, **getattr(losses, "info", {})}
        if info.get("signal") == "answers" and process.is_first:
            console().print(
                "All calibration rewards tie, so rollouts carry no signal: modules are scored by the supervised gradient of "
                "the reference answers instead."
            )
    total = len(losses) if hasattr(losses, "__len__") else None
    steps = None
    if scorer.needs_update:
        steps = OptimizerSteps(partial(_optimizer, pl_module), scoring.trainable)
        turns = len(turns_of(candidates, steps.most))
        info |= {"turns": turns}
        total = None if total is None else turns * total
        if process.is_first:
            say(f"Scoring by {scorer.steps} optimizer steps that are not taken, in {turns} turns of {steps.most:,} weights")
    with evaluation_mode(model), progress_bar(trainer, "Scoring modules", total) as advance:
        scores = score_modules(
            model,
            candidates,
            losses,
            scorer,
            scoring.ranks,
            scoring.gradients,
            evaluate_loss=lambda: _mean_loss(losses),
            kept=kept,
            on_loss=lambda seen: advance(seen, None),
            steps=steps,
            process=process,
        )
    return scores, info


def _calibration_losses(scoring: Scoring, trainer: Trainer, pl_module: LightningModule, kept: ScoringProgress) -> Any:
    options: dict[str, Any] = {"kept": kept} if isinstance(pl_module, PolicyModule) else {}
    if scoring.scorer.needs_update and isinstance(pl_module, LanguageModule):
        options["steps"] = scoring.scorer.steps
    with progress_bar(trainer, "Calibration rollouts", None) as advance:
        listeners = getattr(pl_module, "generation_listeners", [])
        listeners.append(advance_by_token := lambda running, decoded, total: advance(decoded, total))
        try:
            return pl_module.calibration_losses(scoring.calibration_prompts, **options)  # type: ignore[operator]
        finally:
            listeners.remove(advance_by_token)


def _optimizer(pl_module: LightningModule, stand_ins: list[nn.Parameter]) -> Optimizer:
    """The run's optimizer at the rate of fully trained modules; of a module that does not say which, AdamW."""
    if not isinstance(pl_module, AdaptedModule):
        return AdamW(stand_ins)
    return make_optimizer(pl_module.optimizer_class, [{"params": stand_ins, "lr": pl_module.rates["full"], "name": "full"}])


def _mean_loss(losses: Iterable[Tensor]) -> float:
    with torch.no_grad():
        values = [float(loss) for loss in losses]
    return sum(values) / len(values)
