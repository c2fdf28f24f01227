"""`HybridAdapterSetup`: scores the modules, plans the hybrid adapter and applies it, before training starts.

    calibration rollouts -> gradients -> scores -> plan -> adapter

It works for every LightningModule that follows the protocol `Adaptable`, not only for `PolicyModule`.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from hybrid_lightning.adapters.budgets import Budget, ModuleBudget, config_with_defaults, make_plan, plan_of_budget
from hybrid_lightning.adapters.candidates import find_candidates
from hybrid_lightning.adapters.gradients import ExactGradients, GradientMode
from hybrid_lightning.adapters.lora_settings import LoraSettings
from hybrid_lightning.adapters.plan import AdapterPlan, model_digest
from hybrid_lightning.adapters.plan_display import draw_heatmap, plan_markdown, plan_rows, plan_table, plan_title
from hybrid_lightning.adapters.rank_pattern import check_pattern, ranks_by_pattern
from hybrid_lightning.adapters.scorers import PreconditionedTail, Scorer
from hybrid_lightning.adapters.scoring_progress import SCORING, ScoringProgress
from hybrid_lightning.callbacks.adaptable import check_adaptable
from hybrid_lightning.callbacks.candidate_scores import Scoring, score_candidates
from hybrid_lightning.callbacks.display import console, say
from hybrid_lightning.callbacks.loggers import log_figure, log_table
from hybrid_lightning.callbacks.resume import SETTINGS_KEY, Resume, check_evaluated
from hybrid_lightning.callbacks.run_folder import run_folder
from hybrid_lightning.callbacks.step_timer import time_charged_to
from hybrid_lightning.configurable import Configurable
from hybrid_lightning.errors import CalibrationError, CheckpointError, ConfigError, PlanError
from hybrid_lightning.policy.adaptation import CHECKPOINT_KEY, AdaptedModule, adapter_state
from hybrid_lightning.policy.language import LanguageModule
from hybrid_lightning.policy.sharded_scoring import SharedProgress, scored_together
from hybrid_lightning.policy.update import restart_epoch
from hybrid_lightning.sharding.checkpoints import checkpoint_exists, read_checkpoint
from hybrid_lightning.sharding.fsdp2 import FSDP2Strategy
from hybrid_lightning.stopping import RunStopped

_SHOWN_OTHERS = 10  # number of modules of a plan that are printed, in addition to the fully trained ones
# Arguments of the policy on which no score depends.
_AFTER_SCORING = {
    "correction",
    "dynamic_sampling",
    "epochs_per_rollout",
    "eval_samples",
    "gradient_checkpointing",
    "lr_full",
    "lr_lora",
    "minibatches_per_rollout",
    "optimizer",
    "quantization",
    "schedule",
    "token_mask",
}
# Those of them on which an update depends.
_OF_UPDATES = {"lr_full", "lr_lora", "minibatches_per_rollout", "optimizer"}


class HybridAdapterSetup(Configurable, Callback):
    """Chooses the modules that are trained fully and gives LoRA to all other candidates.

    The plan is taken from the checkpoint that is being loaded, else from `plan`, else it is made by scoring. It is written to the
    run folder as `plan.json` and `plan.png`. Scores are saved as they are found, in the folder `scoring` of the run folder: if
    that is given as `ckpt_path` to another run with the same settings, scoring continues from there to the same plan. Evaluation
    without a checkpoint and without `plan` leaves the model unchanged.

    Checkpoints hold the settings of the run. When a run is resumed, they are compared with the new ones, and what was changed is
    applied or refused (see `callbacks/resume.py`).

    Args:
        budget: How many modules are fully trained; None takes `ModuleBudget(share=0.1)`. Share 0 is LoRA, 1 full fine-tuning.
        scorer: Scores how badly low rank serves a module; None takes `PreconditionedTail()`.
        gradients: How gradients are held while scoring; None takes `ExactGradients()`.
        rank: LoRA rank r.
        alpha: LoRA scale: alpha / rank.
        dropout: LoRA dropout.
        use_dora: Weight-decomposed LoRA.
        use_rslora: Scale by alpha / sqrt(rank).
        rank_pattern: Ranks of modules that have not `rank`, such as `{mlp: 8, attention: 1}`: by `attention` or `mlp`, or by the
            end of their names, such as `q_proj`, where the longest name decides. alpha / rank stays the same (with `use_rslora`
            alpha does). Rank 0 freezes a module that is not fully trained.
        target_modules: Candidates by the end of their name, such as `[q_proj, v_proj]`; None takes every linear module in the
            decoder blocks.
        calibration_prompts: Number of prompts whose rollouts score the modules; None lets the module choose: `PolicyModule` takes
            as many as one rollout has, so that scoring costs about as much as a training step.
        plan: Path of a `plan.json` to use instead of scoring.
        keep_start_weights: Keep the frozen originals of fully trained modules, which a KL term needs. False saves their memory.

    Raises:
        ConfigError: If a value is impossible.
    """

    def __init__(
        self,
        budget: Budget | None = None,
        scorer: Scorer | None = None,
        gradients: GradientMode | None = None,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        use_dora: bool = False,
        use_rslora: bool = False,
        rank_pattern: dict[str, int] | None = None,
        target_modules: Sequence[str] | None = None,
        calibration_prompts: int | None = None,
        plan: str | None = None,
        keep_start_weights: bool = True,
    ) -> None:
        if calibration_prompts is not None and calibration_prompts < 1:
            raise ConfigError(f"adapter.calibration_prompts must be at least 1, got {calibration_prompts}")
        self.budget = budget or ModuleBudget()
        self.scorer = scorer or PreconditionedTail()
        self.gradients = gradients or ExactGradients()
        self.lora = LoraSettings(rank, alpha, dropout, use_dora, use_rslora)
        self.rank_pattern = dict(rank_pattern or {})
        check_pattern(self.rank_pattern)
        self.target_modules = target_modules
        self.calibration_prompts = calibration_prompts
        self.plan_path = plan
        self.given_plan = None if plan is None else AdapterPlan.load(plan)  # a bad file is found before anything is loaded
        self.keep_start_weights = keep_start_weights
        self.plan: AdapterPlan | None = None
        self.resume = Resume()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the plan and apply it. An adapter that is already applied stays unchanged.

        Raises:
            ConfigError: If the module does not follow the protocol, or settings contradict each other.
            CheckpointError: If the plan file, or a setting that cannot be changed, differs from the checkpoint.
            PlanError: If the plan file is not the plan that is already applied, or belongs to another model.
        """
        folder = run_folder(trainer) if stage == "fit" else None  # made before the scoring, which may be stopped
        checkpoint = _checkpoint(trainer)
        self._plan_of_checkpoint(trainer)  # first, so that the message for another plan is not about the settings behind it
        if stage == "fit":
            self.resume.begin(trainer, pl_module, self)
            if checkpoint is not None:
                self.resume.compare(checkpoint, trainer)
        elif checkpoint is not None:
            check_evaluated(checkpoint, self)
        plan: AdapterPlan | None = getattr(pl_module, "plan", None)
        if plan is not None:
            self._check_applied(plan)
        else:
            plan = self._adapt(trainer, pl_module, stage)
        self.plan = plan
        if plan is not None and stage == "fit" and trainer.is_global_zero:
            self._show(plan, folder)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the settings, and the plan for modules that do not save it themselves."""
        checkpoint[SETTINGS_KEY] = self.resume.state()
        if not isinstance(pl_module, AdaptedModule) and self.plan is not None:
            checkpoint[CHECKPOINT_KEY] = {"plan": self.plan.to_dict(), "base_digest": self.plan.model_digest}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Apply what was changed at a resume."""
        if trainer.state.fn == "fit":
            self.resume.compare(checkpoint, trainer)  # under Lightning's own Trainer `setup` does not see the checkpoint
            self.resume.apply(checkpoint, trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the epoch anew if its number of micro-batches was changed at a resume."""
        if self.resume.epoch_begins_anew:
            restart_epoch(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the plan as a table and a picture."""
        if self.plan is None or not trainer.is_global_zero or not trainer.loggers:
            return
        log_table(trainer, "plan", *plan_rows(self.plan), step=0, markdown=plan_markdown(self.plan))
        if any(module.score is not None for module in self.plan.candidates):
            log_figure(trainer, "plan/scores", draw_heatmap(self.plan), step=0)

    # ---- deciding

    def _check_applied(self, plan: AdapterPlan) -> None:
        if self.given_plan is not None and self.given_plan.digest != plan.digest:
            raise PlanError(
                f"the model is adapted by plan {plan.digest[:12]} already and cannot take adapter.plan={self.plan_path} "
                f"(plan {self.given_plan.digest[:12]}); load the model anew, or remove adapter.plan"
            )

    def _adapt(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> AdapterPlan | None:
        check_adaptable(pl_module)
        plan = self._plan_of_checkpoint(trainer) or self.given_plan
        if plan is None and stage != "fit":
            return None
        self._check_start_weights(pl_module)
        if plan is None:
            check_settings = getattr(pl_module, "check_settings", None)
            if check_settings is not None:
                check_settings()  # on every rank, so that each ends with the cause, and none waits for the scores of rank 0
            with time_charged_to(trainer, "scoring"):
                plan = self._make_plan(trainer, pl_module, run_folder(trainer))
        self._apply(pl_module, plan)
        return plan

    def _plan_of_checkpoint(self, trainer: Trainer) -> AdapterPlan | None:
        checkpoint = _checkpoint(trainer)
        if checkpoint is None:
            return None
        saved = adapter_state(checkpoint)["plan"]
        plan = None if saved is None else AdapterPlan.from_dict(saved, source=str(trainer.ckpt_path))
        if plan is not None and self.given_plan is not None and plan.digest != self.given_plan.digest:
            raise CheckpointError(
                f"adapter.plan={self.plan_path} (plan {self.given_plan.digest[:12]}) is not the plan of the checkpoint "
                f"({plan.digest[:12]}); remove adapter.plan to resume, or start a new run without ckpt_path"
            )
        return plan

    def check(self, pl_module: LanguageModule) -> None:
        """Check that the settings fit a module, before its weights are loaded.

        Raises:
            ConfigError: If its loss needs start weights that are not kept.
            ModelError: If `target_modules` or `rank_pattern` match none of its modules.
            PlanError: If `plan` has modules that it does not have.
        """
        self._check_start_weights(pl_module)
        if self.target_modules is not None or self.rank_pattern:
            self.ranks(find_candidates(pl_module.pretrained.skeleton(), self.target_modules))
        if self.given_plan is not None:
            self.given_plan.check_model(pl_module.pretrained.skeleton())

    def _check_start_weights(self, pl_module: LightningModule) -> None:
        loss = getattr(pl_module, "loss", None)
        if getattr(loss, "needs_reference", False) and not self.keep_start_weights:
            raise ConfigError(
                "the loss needs the start policy (a KL term with kl_coef > 0, or DPO); set adapter.keep_start_weights=true"
            )

    def _make_plan(self, trainer: Trainer, pl_module: LightningModule, folder: Path | None) -> AdapterPlan:
        """Score on all ranks of FSDP2 together, else on rank 0, and broadcast the plan or the error, so that no rank waits."""
        strategy = trainer.strategy
        if isinstance(strategy, FSDP2Strategy) and isinstance(pl_module, LanguageModule) and trainer.world_size > 1:
            together: AdapterPlan = self._planned(trainer, pl_module, folder, strategy)
            return AdapterPlan.from_dict(strategy.broadcast(together.to_dict()))
        content: dict[str, Any] = {}
        error: Exception | RunStopped | None = None
        if trainer.is_global_zero:
            try:
                content = self._planned(trainer, pl_module, folder).to_dict()
            except (Exception, RunStopped) as raised:
                if trainer.world_size == 1:
                    raise
                error = raised
        reason: Any = error.number if isinstance(error, RunStopped) else error and f"{type(error).__name__}: {error}"
        content, reason = trainer.strategy.broadcast((content, reason))
        if isinstance(reason, int):
            raise RunStopped(reason, together=True) from error
        if error is not None:
            raise error
        if reason is not None:
            raise CalibrationError(f"rank 0 could not score the modules: {reason}")
        return AdapterPlan.from_dict(content)

    def _planned(
        self, trainer: Trainer, pl_module: LightningModule, folder: Path | None, splits: FSDP2Strategy | None = None
    ) -> AdapterPlan:
        model = getattr(pl_module, str(pl_module.adapter_attribute))
        if splits is None:
            model.to(trainer.strategy.root_device)
        digest = pl_module.base_digest if isinstance(pl_module, AdaptedModule) else model_digest(model)
        candidates = find_candidates(model, target_modules=self.target_modules)
        hparams = getattr(pl_module, "hparams", {})
        scores: dict[str, float] | None = None
        info: dict[str, Any] = {}
        if self.budget.needs_scores:
            earlier: Path | None = getattr(trainer, "earlier_scoring", None)
            signals = getattr(pl_module, "signals", None)
            if not (self.scorer.needs_gradient or self.scorer.needs_loss or self.scorer.needs_update):
                splits = None  # the weights alone, which every rank has, or not even these
            kind = ScoringProgress if splits is None else SharedProgress
            kept = kind(None if folder is None or not trainer.is_global_zero else folder / SCORING, earlier, signals)
            kept.require({"model": digest, "modules": list(candidates), **self._what_scores_depend_on(hparams)})
            scoring = self._scoring(candidates)
            if splits is None:
                scores, info = score_candidates(scoring, trainer, pl_module, model, candidates, kept)
            else:
                assert isinstance(pl_module, LanguageModule)
                with scored_together(pl_module, splits, candidates) as process:
                    scores, info = score_candidates(scoring, trainer, pl_module, pl_module.model, candidates, kept, process)
        return make_plan(
            model=str(hparams.get("model", type(model).__name__)),
            revision=hparams.get("revision"),
            model_digest=digest,
            candidates=candidates,
            budget=self.budget,
            lora=self.lora,
            scores=scores,
            scorer=self.scorer if scores is not None else None,
            calibration=info,
            seed=hparams.get("seed"),
            ranks=self.ranks(candidates),
        )

    def ranks(self, candidates: Iterable[str]) -> dict[str, int]:
        """Rank of each candidate as LoRA.

        Raises:
            ConfigError: If nothing would be trained.
        """
        ranks = ranks_by_pattern(candidates, self.rank_pattern, self.lora.rank)
        if self.budget.share == 0 and not any(ranks.values()):
            raise ConfigError("adapter.rank_pattern freezes all modules, and the budget trains none of them fully: raise a rank")
        return ranks

    def _scoring(self, candidates: dict[str, Any]) -> Scoring:
        most = 0
        if self.scorer.needs_update:
            most = plan_of_budget(candidates, self.budget, self.lora, self.rank_pattern).trainable_parameters()
        return Scoring(self.scorer, self.gradients, self.ranks(candidates), self.calibration_prompts, most)

    def _what_scores_depend_on(self, hparams: Mapping[str, Any]) -> dict[str, Any]:
        later = _AFTER_SCORING - (_OF_UPDATES if self.scorer.needs_update else set())
        settings = {name: value for name, value in hparams.items() if name not in later and not name.startswith("_")}
        return {
            **{f"model.{name}": value for name, value in sorted(settings.items())},
            "adapter.scorer": config_with_defaults(self.scorer),
            "adapter.gradients": config_with_defaults(self.gradients or ExactGradients()),
            "adapter.rank": self.lora.rank,
            **({"adapter.rank_pattern": self.rank_pattern} if self.rank_pattern else {}),
            "adapter.calibration_prompts": self.calibration_prompts,
        }

    # ---- applying and showing

    def _apply(self, pl_module: LightningModule, plan: AdapterPlan) -> None:
        if isinstance(pl_module, AdaptedModule):
            pl_module.adapt(plan, self.keep_start_weights)
            return
        from hybrid_lightning.adapters.apply import apply_plan  # PEFT is slow to import

        name: str = pl_module.adapter_attribute  # type: ignore[assignment]
        model = getattr(pl_module, name)
        if plan is self.given_plan:  # not for the plan of a checkpoint, whose weights are loaded afterwards
            plan.check_weights(model)
        setattr(pl_module, name, apply_plan(model, plan, self.keep_start_weights))
        pl_module.plan = plan  # type: ignore[assignment]

    def _show(self, plan: AdapterPlan, folder: Path | None) -> None:
        if folder is not None:
            plan.save(folder / "plan.json")
            self._draw(plan, folder / "plan.png")
        say(plan_title(plan))
        rest = 0
        modes = {module.mode for module in plan.candidates}
        if len(modes) > 1 or any(module.score is not None for module in plan.candidates):  # else a table of them says nothing
            table = plan_table(plan, _SHOWN_OTHERS)
            table.title = None
            console().print(table)
            rest = len(plan.candidates) - table.row_count
        more = f"{rest} more {'module' if rest == 1 else 'modules'}"
        if folder is not None:
            say(f"Plan{f', with {more},' if rest else ''} written to {folder / 'plan.json'}")
        elif rest:
            say(f"and {more}")

    def _draw(self, plan: AdapterPlan, path: Path) -> None:
        if any(module.score is not None for module in plan.candidates):
            draw_heatmap(plan).savefig(path, dpi=150)


def _checkpoint(trainer: Trainer) -> dict[str, Any] | None:
    """The content of the checkpoint that is about to be loaded, without its tensors."""
    path = trainer.ckpt_path
    return (
        read_checkpoint(path) if path and checkpoint_exists(path) else None
    )  # Lightning itself says that a checkpoint is missing
