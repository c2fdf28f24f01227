"""`HybridAdapterSetup`: finds the adapter plan of a run, applies it before training starts, and shows it.

The plan comes from the checkpoint, else from a file, else from `planning.py`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from hybrid_lightning.adapters.budgets import Budget, ModuleBudget, Planning
from hybrid_lightning.adapters.candidates import check_pattern, is_linear, share_of_experts, without_lora
from hybrid_lightning.adapters.gradients import ExactGradients, GradientMode
from hybrid_lightning.adapters.lora_settings import LoraSettings, check_lora_modules
from hybrid_lightning.adapters.plan import AdapterPlan
from hybrid_lightning.adapters.plan_display import draw_heatmap, plan_rows, plan_table, plan_title
from hybrid_lightning.adapters.scorers import PreconditionedTail, Random, Scorer
from hybrid_lightning.callbacks.display import console, say
from hybrid_lightning.callbacks.loggers import log_figure, log_table
from hybrid_lightning.callbacks.planning import Planner, applied_plan, check_adaptable, model_of
from hybrid_lightning.callbacks.resume import SETTINGS_KEY, Resume, check_evaluated
from hybrid_lightning.callbacks.run_folder import run_folder
from hybrid_lightning.callbacks.step_timer import time_charged_to
from hybrid_lightning.errors import CheckpointError, ConfigError, HybridLightningError, PlanError
from hybrid_lightning.rollout.rollout_engine import WeightedEngine
from hybrid_lightning.sharding.checkpoints import checkpoint_exists, read_checkpoint
from hybrid_lightning.shared.configurable import Configurable
from hybrid_lightning.training.checkpoint import CHECKPOINT_KEY, adapter_state, new_state
from hybrid_lightning.training.module import LanguageModule

_SHOWN_OTHERS = 10  # number of printed modules of a plan, besides the fully trained ones


class HybridAdapterSetup(Configurable, Callback):
    """Chooses the modules to train fully and gives LoRA to all other candidates.

    The plan comes from the checkpoint being loaded, or else from `plan`, or else from scoring. It is written to the run folder as
    `plan.json` and `plan.png`. Interrupted scoring starts over with the next command. Evaluation without a checkpoint and
    without `plan` leaves the model unchanged.

    Checkpoints hold the run's settings. At a resume they are compared with the new settings, and each change is applied or
    refused (see `callbacks/resume.py`).

    Args:
        budget: How many modules are fully trained; None takes `ModuleBudget(share=0.1)`. Share 0 is LoRA, 1 full fine-tuning.
        scorer: Scores how badly low rank serves a module; None takes `PreconditionedTail()`.
        gradients: How gradients are held while scoring; None takes `ExactGradients()`.
        rank: LoRA rank r.
        alpha: LoRA scale: alpha / rank.
        dropout: LoRA dropout.
        use_dora: Weight-decomposed LoRA.
        use_rslora: Scale by alpha / sqrt(rank).
        rank_pattern: Ranks of modules that differ from `rank`, such as `{mlp: 8, attention: 1}`: by `attention` or `mlp`, or by
            the end of their names, such as `q_proj`, where the longest name decides. alpha / rank stays the same (with
            `use_rslora` alpha does). Rank 0 freezes a module that is not fully trained. Experts are candidates only if they are
            named, as in `{experts: 4}`; each expert has the whole rank.
        target_modules: Candidates by the end of their name, such as `[q_proj, v_proj]`; None takes every linear module in the
            decoder blocks.
        calibration_prompts: Number of prompts in the rollouts that score the modules; None lets the module choose.
            `PolicyModule` takes the number of prompts in one rollout, so that scoring costs about the same as a training step.
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
        pattern = dict(rank_pattern or {})
        check_pattern(pattern)
        self.planning = Planning(
            budget=budget or ModuleBudget(),
            scorer=scorer or PreconditionedTail(),
            gradients=gradients or ExactGradients(),
            lora=LoraSettings(rank, alpha, dropout, use_dora, use_rslora),
            rank_pattern=pattern,
            target_modules=target_modules,
            calibration_prompts=calibration_prompts,
        )
        self.given_plan = None if plan is None else AdapterPlan.load(plan)  # a bad file is found before anything is loaded
        self.plan_path, self.keep_start_weights = plan, keep_start_weights
        self.plan: AdapterPlan | None = None
        self.resume = Resume()

    def with_random_scores(self) -> Self:
        """A new callback with these arguments that chooses the fully trained modules at random, without rollouts."""
        return type(self)(**{**self._init_args, "scorer": Random()})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the plan and apply it, at every stage.

        An adapter that is already applied stays unchanged. A plan file that differs from the applied plan or from the
        checkpoint's plan is refused, and so are settings that differ from the checkpoint's and cannot be changed.
        """
        folder = run_folder(trainer) if stage == "fit" else None
        path = trainer.ckpt_path  # Lightning reports a missing file later
        checkpoint = read_checkpoint(path) if path and checkpoint_exists(path) else None
        # First, so that for another plan the message is about the plan, not about the settings it implies.
        saved = None
        if checkpoint is not None and (content := adapter_state(checkpoint)["plan"]) is not None:
            saved = AdapterPlan.from_dict(content, source=str(trainer.ckpt_path))
            self._require_same(saved, CheckpointError, "of the checkpoint", "start a new run without ckpt_path")
        if stage == "fit":
            self.resume.begin(trainer, pl_module, self)
            if checkpoint is not None:
                self.resume.compare(checkpoint, trainer)
        elif checkpoint is not None:
            check_evaluated(checkpoint, self)
        self.plan = applied_plan(pl_module)
        if self.plan is None:
            self.plan = self._adapt(trainer, pl_module, saved)
        else:
            self._require_same(self.plan, PlanError, "by which the model is adapted", "load the model again")
        if self.plan is not None and stage == "fit" and trainer.is_global_zero and getattr(trainer, "command", "") != "doctor":
            trained = (*self.plan.full_modules, *self.plan.lora_modules)
            self._show(self.plan, folder, share_of_experts(model_of(pl_module), trained), resumed=saved is not None)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the settings, and the plan for modules that do not save it themselves."""
        checkpoint[SETTINGS_KEY] = self.resume.state()
        if not isinstance(pl_module, LanguageModule) and self.plan is not None:
            checkpoint[CHECKPOINT_KEY] = new_state(self.plan, self.plan.model_digest)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Apply the changes of a resume."""
        if trainer.state.fn == "fit":
            self.resume.compare(checkpoint, trainer)  # under Lightning's own Trainer, `setup` does not see the checkpoint
            self.resume.apply(checkpoint, trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the plan as a table and a picture."""
        if self.plan is None or not trainer.is_global_zero or not trainer.loggers:
            return
        log_table(trainer, "plan", *plan_rows(self.plan), step=0)
        if self.plan.is_scored:
            log_figure(trainer, "plan/scores", draw_heatmap(self.plan), step=0)

    def check(self, pl_module: LanguageModule) -> None:
        """Check that start weights are kept if the loss needs them, that the sampler takes such an adapter, and module names.

        This is done before weights are loaded.
        """
        pl_module.task.check_start_weights(self.keep_start_weights)
        planning, plan, sampler = self.planning, self.given_plan, pl_module.task.generation.sampler
        experts = False
        if planning.target_modules is not None or planning.rank_pattern:
            candidates = planning.candidates(pl_module.policy.pretrained.skeleton())
            experts = any(rank and not is_linear(candidates[name]) for name, rank in planning.ranks(candidates).items())
        if plan is None:
            ranks = planning.rank_pattern.values() or [planning.lora.rank]
            received = (planning.budget.share > 0, planning.lora.use_dora, [*ranks], experts)
        else:
            received = (bool(plan.full_modules), plan.lora.use_dora, [*plan.ranks], plan.has_experts)
            plan.check_model(pl_module.policy.pretrained.skeleton())
            check_lora_modules(plan.lora_modules)
        if isinstance(sampler, WeightedEngine):
            sampler.check_adapter(*received)

    def _require_same(self, plan: AdapterPlan, error: type[HybridLightningError], which: str, remedy: str) -> None:
        """Refuse a plan file that differs from the plan that the model has or gets."""
        given = self.given_plan
        if given is not None and given.digest != plan.digest:
            raise error(
                f"adapter.plan={self.plan_path} (plan {given.digest[:12]}) is not the plan {which} ({plan.digest[:12]}); remove "
                f"adapter.plan, or {remedy}"
            )

    def _adapt(self, trainer: Trainer, pl_module: LightningModule, saved: AdapterPlan | None) -> AdapterPlan | None:
        check_adaptable(pl_module)
        plan = saved or self.given_plan
        if plan is None and trainer.state.fn != "fit":
            return None
        if isinstance(pl_module, LanguageModule):
            if trainer.state.fn == "fit" and "PL_GLOBAL_SEED" not in os.environ:  # a script that has not called seed_everything
                torch.manual_seed(pl_module.task.seed)
            pl_module.task.check_start_weights(self.keep_start_weights)
            if plan is None:
                pl_module.check_settings()  # on every rank, so that each ends with the cause and none waits for the scores
        if plan is None:
            with time_charged_to(trainer, "scoring"):
                plan = Planner(self.planning, trainer, pl_module).plan()
        if isinstance(pl_module, LanguageModule):
            pl_module.adapt(plan, self.keep_start_weights)
            return plan
        from hybrid_lightning.adapters.apply import apply_plan  # PEFT is slow to import

        model = model_of(pl_module)
        if plan is self.given_plan:  # not for a checkpoint's plan: its weights are loaded afterwards
            plan.check_weights(model)
        setattr(pl_module, str(pl_module.adapter_attribute), apply_plan(model, plan, self.keep_start_weights))
        pl_module.plan = plan  # type: ignore[assignment]
        return plan

    def _show(self, plan: AdapterPlan, folder: Path | None, of_experts: float, resumed: bool) -> None:
        if folder is not None:
            plan.save(folder / "plan.json")
            if plan.is_scored:
                draw_heatmap(plan).savefig(folder / "plan.png", dpi=150)
        if resumed:  # the stopped run has shown the rest
            say(f"{plan_title(plan)}, as in the checkpoint")
            return
        say(plan_title(plan))
        if of_experts:
            say(f"Also frozen: experts, {of_experts:.0%} of the weights; adapter.rank_pattern={{experts: 4}} gives them LoRA")
        frozen = without_lora(module.name for module in plan.candidates if module.mode == "frozen")
        if frozen:
            count = f"{len(frozen)} module{'' if len(frozen) == 1 else 's'}"
            say(f"Also frozen: {count} such as {frozen[0]}; kernels of state space layers read these weights past LoRA")
        rest = 0
        if plan.is_scored or len({module.mode for module in plan.candidates}) > 1:  # without either a table has nothing to show
            table = plan_table(plan, _SHOWN_OTHERS)
            table.title = None
            console().print(table)
            rest = len(plan.candidates) - table.row_count
        more = f"{rest} more {'module' if rest == 1 else 'modules'}"
        if folder is not None:
            say(f"Plan{f', with {more},' if rest else ''} written to {folder / 'plan.json'}")
        elif rest:
            say(f"and {more}")
