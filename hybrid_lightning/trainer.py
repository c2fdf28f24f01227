"""`Trainer`: Lightning's Trainer with `score`, `export`, `plan` and `doctor`, and with checks before a model is loaded."""

import copy
from contextlib import suppress
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import Callback, Checkpoint, LearningRateMonitor, ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from hybrid_lightning.callbacks.diagnosis import Diagnosis, Doctor
from hybrid_lightning.callbacks.display import console, export_command, say
from hybrid_lightning.callbacks.evaluation_report import EvaluationReport, check_monitors
from hybrid_lightning.callbacks.graceful_stop import GracefulStop
from hybrid_lightning.callbacks.hybrid_adapter_setup import HybridAdapterSetup
from hybrid_lightning.callbacks.model_checkpoint import ModelCheckpoint
from hybrid_lightning.callbacks.policy_export import PolicyExport, policy_in_training
from hybrid_lightning.callbacks.progress import RolloutProgress, StepLines
from hybrid_lightning.callbacks.resume import check_evaluated
from hybrid_lightning.callbacks.run_folder import RunFolder, find_callback, run_folder
from hybrid_lightning.callbacks.run_report import RunReport
from hybrid_lightning.callbacks.run_summary import RunSummary
from hybrid_lightning.callbacks.step_timer import StepTimer, time_charged_to
from hybrid_lightning.data import PromptDataModule
from hybrid_lightning.errors import CheckpointError, ConfigError, DiagnosisError, HybridLightningError
from hybrid_lightning.export.adapter_folder import AdapterFolder
from hybrid_lightning.export.merged_model import MergedModel
from hybrid_lightning.export.push import open_repository, push_folder
from hybrid_lightning.export.sources import policy_of_checkpoint
from hybrid_lightning.export.trained import ExportForm
from hybrid_lightning.export.write import check_target, write_policy, written_message
from hybrid_lightning.memory import RunSettings, TrainerFlags, plan_memory
from hybrid_lightning.memory.fitting import find_changes, room, taken, verdict, why_not_fitting
from hybrid_lightning.memory.memory_table import gathers_note, memory_notes, memory_table, memory_title
from hybrid_lightning.memory.peaks import own_method, plan_method
from hybrid_lightning.reports.findings import Finding, cause, of_memory
from hybrid_lightning.rollout.vllm.in_process import VLLMSampler
from hybrid_lightning.sharding.checkpoints import read_checkpoint, require_checkpoint
from hybrid_lightning.sharding.fsdp2 import chosen_strategy
from hybrid_lightning.shared.quiet import quiet_libraries
from hybrid_lightning.shared.stopping import StopSignals
from hybrid_lightning.training.lightning_internals import attach, name_checkpoint
from hybrid_lightning.training.module import LanguageModule
from hybrid_lightning.training.policy_module import PolicyModule

# Defaults: of the Trainer, of its checkpoints, and of its logger.
TRAINER_DEFAULTS: dict[str, Any] = {
    "log_every_n_steps": 1,
    "enable_model_summary": False,  # the plan shows the trained modules
    "num_sanity_val_steps": -1,  # all validation data: this measures the accuracy before training
}
CHECKPOINT_DEFAULTS: dict[str, Any] = {"save_last": True, "filename": "step={step}", "auto_insert_metric_name": False}
LOGGER_DEFAULTS: dict[str, Any] = {"save_dir": "runs", "name": "default", "default_hp_metric": False}


def run_callbacks(signals: StopSignals | None = None, logged: bool = True) -> list[Callback]:
    """The callbacks without options that the command line adds to each run; callbacks that measure time come first.

    `signals` is passed to `GracefulStop`; `logged` tells whether the Trainer has a logger.

    Example:
        >>> [type(callback).__name__ for callback in run_callbacks(logged=False)]
        ['StepTimer', 'RunSummary', 'EvaluationReport', 'Diagnosis', 'GracefulStop', 'RunReport']
    """
    fixed = [StepTimer(), RunSummary(), EvaluationReport(), Diagnosis(), GracefulStop(signals), RunReport()]
    return [*fixed, LearningRateMonitor(logging_interval="step")] if logged else fixed


class Trainer(LightningTrainer):
    """Lightning's Trainer with more commands: it also scores modules, exports and plans. It takes Lightning's arguments by name.

    Defaults are the same as on the command line: a TensorBoard logger in `runs/default` (or below `default_root_dir`), a
    checkpoint of the last step, `log_every_n_steps=1`, `num_sanity_val_steps=-1`, no table of modules, and a progress bar in a
    terminal or one line per step elsewhere. Making a Trainer hides advice that libraries print (see `quiet_libraries`).

    Each run has its own folder, `log_dir`, for the files of loggers, checkpoints and callbacks (see `RunFolder`), whatever the
    loggers. `setup` hooks can see the checkpoint that is about to be loaded. The Trainer reports the time of checkpoints to
    `StepTimer`, since Lightning has no hook for it.
    """

    command = "fit"  # the user's command that Lightning runs as `fit`: "fit", "score" or "doctor"

    @wraps(LightningTrainer.__init__)  # type: ignore[misc]  # for the signature, which lists the options
    def __init__(self, **flags: Any) -> None:
        quiet_libraries()
        flags = {**TRAINER_DEFAULTS, **flags}
        given = flags.get("callbacks") or []
        callbacks = list(given) if isinstance(given, (list, tuple)) else [given]
        if flags.get("logger") in (None, True):
            flags["logger"] = TensorBoardLogger(**{**LOGGER_DEFAULTS, "save_dir": flags.get("default_root_dir") or "runs"})
        if flags.get("enable_checkpointing") is not False and not _any(callbacks, Checkpoint):
            callbacks.append(ModelCheckpoint(**CHECKPOINT_DEFAULTS))
        if flags.get("enable_progress_bar") is None and not _any(callbacks, ProgressBar) and not console().is_terminal:
            flags["enable_progress_bar"] = False  # in a file, the bar would appear after everything else
            callbacks.append(StepLines())
        if flags.get("enable_progress_bar") is not False and not _any(callbacks, ProgressBar):
            callbacks.append(RolloutProgress())
        self._flags = {**flags, "strategy": copy.deepcopy(flags.get("strategy", "auto"))}  # a strategy belongs to one Trainer
        super().__init__(**{**flags, "callbacks": callbacks, "strategy": chosen_strategy(flags.get("strategy", "auto"))})

    def _run(self, model: LightningModule, ckpt_path: Any = None, weights_only: bool | None = None) -> Any:
        if ckpt_path is not None:
            require_checkpoint(ckpt_path)
        # Lightning sets `trainer.ckpt_path` only after the setup hooks, but HybridAdapterSetup needs the checkpoint's plan there,
        # or it would score the modules again.
        name_checkpoint(self, ckpt_path)
        if find_callback(self, RunFolder) is None:
            self.callbacks.insert(0, RunFolder())  # type: ignore[attr-defined]
        return super()._run(model, ckpt_path, weights_only)

    def check_checkpoint(self, ckpt_path: str | None) -> None:
        """Check that a checkpoint exists, if one is given. The command line calls this before anything is loaded.

        Raises:
            CheckpointError: If the checkpoint does not exist, or if the path is a keyword of Lightning for a checkpoint of an
                earlier `fit` with the same Trainer. A command has no earlier `fit`, and would begin from the start policy.
        """
        folder = getattr(self.checkpoint_callback, "dirpath", None)
        if ckpt_path == "best" or (ckpt_path == "last" and folder is None):
            raise CheckpointError(
                f"ckpt_path={ckpt_path} means a checkpoint of this run, which has none yet; give a path such as "
                "runs/NAME/version_0/checkpoints/last.ckpt"
            )
        if ckpt_path is not None and ckpt_path not in ("last", "hpc", "registry"):
            require_checkpoint(ckpt_path)

    def _teardown(self) -> None:
        if self.interrupted and isinstance(self.lightning_module, LanguageModule):
            # Lightning then calls no teardown hook, and the process may continue, as in a notebook.
            with suppress(Exception):  # the user must see the error that ended the run
                self.lightning_module.task.generation.shut_down()
        super()._teardown()
        folder = find_callback(self, RunFolder)
        if self.interrupted and folder is not None and self.is_global_zero:
            folder.give_back()  # only now, since loggers write into the folder when they are closed

    @property
    def log_dir(self) -> str | None:
        """The folder of the run, whatever the loggers; None under `fast_dev_run`.

        All processes must make the first access together, as Lightning does before loggers begin to write.
        """
        folder = run_folder(self)
        return None if folder is None else str(folder)

    def save_checkpoint(self, filepath: str | Path, weights_only: bool | None = None, storage_options: Any | None = None) -> None:
        """Save a checkpoint as Lightning does, and measure the time."""
        with time_charged_to(self, "checkpoint"):
            super().save_checkpoint(filepath, bool(weights_only), storage_options)  # Lightning prints a line for None

    def _run_stage(self) -> Any:
        results = super()._run_stage()
        # A run that was stopped in its last validation has no steps left. Lightning then does not start the training loop, and
        # its hooks would run the validation.
        stop = find_callback(self, GracefulStop)
        if self.state.fn == "fit" and stop is not None and stop.validation_due:
            self.fit_loop.on_run_start()
            self.fit_loop.on_run_end()
        return results

    def check(self, model: LanguageModule, datamodule: LightningDataModule | None = None, command: str = "fit") -> None:
        """Check settings, data, reward and monitors before a model is loaded.

        No weights are loaded, since a module loads them on first use. The data module keeps the data that it reads here. If it
        overrides how data is prepared or set up, its data is not read yet.

        Args:
            model: The module to run.
            datamodule: Its data.
            command: "fit", "score", "doctor", "validate", "test" or "predict".

        Raises:
            ModelError: If the model cannot be found.
            ConfigError: If settings cannot work, or if a callback monitors a metric that will not be measured.
            DataError: If the command has no data, or if the data is malformed.
            RewardError: If the reward cannot score the data.
        """
        if command == "doctor":
            _examined(model, datamodule)
        # As the command will do it.
        attach(self, model, datamodule)
        fits = command in ("fit", "score", "doctor")
        self.state.fn = TrainerFn.FITTING if fits else TrainerFn(command)
        try:
            model.check_settings()
            model.policy.pretrained.check()  # looks up the model on the hub before the data is downloaded
            if isinstance(datamodule, PromptDataModule) and not _prepares_itself(datamodule):
                self._check_data(model, datamodule, command)
            adapter = find_callback(self, HybridAdapterSetup)
            if fits and adapter is not None:
                adapter.check(model)
                self._check_memory(model, adapter, datamodule)
            export = find_callback(self, PolicyExport)
            if command == "fit" and self.is_global_zero and export is not None:
                export.open_repository()
        finally:
            self.state.fn = None

    def _check_data(self, model: LanguageModule, datamodule: PromptDataModule, command: str) -> None:
        assert self.state.fn is not None
        if command == "fit" and self.limit_val_batches and _all_ours(model, self):
            sets = datamodule.set_names("validation")
            for callback in self.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, ModelCheckpoint):
                    callback.monitor_what_is_measured(self, model)
            if sets:
                check_monitors(self, model.evaluation.names(sets), model.task.training_metrics)
        datamodule.setup(self.state.fn)
        if self.state.fn == "fit":
            model.task.check_training_prompts(datamodule.train_prompts)
        tests = self.state.fn in ("test", "predict")
        model.task.generation.check_encoding(datamodule.test_prompts if tests else datamodule.validation_prompts)

    def _check_memory(self, model: LanguageModule, adapter: HybridAdapterSetup, datamodule: LightningDataModule | None) -> None:
        """Reject a rollout engine that needs more GPU memory than training leaves, by the run's memory plan."""
        launcher = self.strategy.launcher
        forks = launcher is not None and launcher.is_interactive_compatible  # a process that has queried a GPU cannot fork
        if not isinstance(model, PolicyModule) or not isinstance(model.task.generation.sampler, VLLMSampler) or forks:
            return
        flags = TrainerFlags.of_trainer(self)
        if flags.on_cpu or flags.device_bytes is None:
            return
        settings = RunSettings.of(model, adapter, datamodule, flags)
        problem = why_not_fitting(settings, plan_method(settings))
        if problem is not None:
            raise ConfigError(problem)

    def score(self, model: LightningModule, datamodule: LightningDataModule | None = None) -> None:
        """Score the modules and write `plan.json` and `plan.png` into the run folder, without training.

        Args:
            model: The module to score.
            datamodule: Its calibration data.

        Raises:
            ConfigError: If the callback HybridAdapterSetup is missing.
        """
        _adapter_of(self, "score")
        # Scoring is part of the setup of `fit`; a `fit` of 0 steps runs only this setup, under every strategy.
        self.fit_loop.epoch_loop.max_steps = 0
        self.num_sanity_val_steps = 0
        self.command = "score"
        try:
            self.fit(model, datamodule=datamodule)
        finally:
            self.command = "fit"

    def export(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        form: ExportForm | None = None,
        push_to: str | None = None,
        *,
        folder: str,
    ) -> None:
        """Write the trained policy as a folder that plain PEFT or transformers loads.

        Args:
            model: The module. With a checkpoint, only its arguments are used, which name the base model.
            datamodule: Its data, for the model card.
            ckpt_path: Checkpoint to export, a file or a sharded folder; None to export the module in its state after `fit`.
            form: `MergedModel` (the default), `AdapterFolder` or `LoraFolder`.
            push_to: Repository on the Hugging Face hub to push the folder to, such as `me/my-model`; a new one is private.
                The token comes from HF_TOKEN or `hf auth login`.
            folder: Folder to write, which must be new or empty.

        Raises:
            CheckpointError: If the checkpoint cannot be read, or settings of the adapter contradict it.
            ConfigError: If the folder is not empty, the form cannot hold the policy, or a push to the repository is not possible.
            PlanError: If the base model is not the one that was adapted.
        """
        if self.is_global_zero:
            check_target(Path(folder))
            push_to = None if push_to is None else open_repository(push_to)
        self.check_checkpoint(ckpt_path)
        if ckpt_path is None:
            policy = policy_in_training(self, model)
        else:
            if (adapter := find_callback(self, HybridAdapterSetup)) is not None:
                check_evaluated(read_checkpoint(ckpt_path), adapter)
            policy = policy_of_checkpoint(ckpt_path, dict(model.hparams), datamodule) if self.is_global_zero else None
        if policy is not None:
            form = form or MergedModel()
            write_policy(policy, form, folder)
            say(written_message(policy, form, folder))
            if push_to is not None:
                say(f"Pushed to {push_folder(Path(folder), push_to, f'Step {policy.training.steps}')}")
            if ckpt_path is not None and isinstance(form, (MergedModel, AdapterFolder)):
                validated = bool(policy.training.before or policy.training.after)
                if command := export_command(Path(ckpt_path).parent.parent, folder, validated):
                    say(f"Next: {command}")

    def doctor(self, model: LightningModule, datamodule: LightningDataModule | None = None) -> None:
        """Find problems that would keep a run from learning, with one rollout and one optimizer step; keeps and writes nothing.

        Modules are not scored: the fully trained modules are chosen at random. The module makes the step: train another one.

        Raises:
            ConfigError: If the callback HybridAdapterSetup is missing, or if the module does not sample its training data.
            DiagnosisError: If the run cannot learn.
        """
        adapter, doctor = _adapter_of(self, "doctor"), Doctor()
        policy, data = _examined(model, datamodule)
        schedule, planning = policy.task.schedule, adapter.planning
        scored = adapter.given_plan is None and planning.budget.needs_scores
        scored_prompts = (planning.calibration_prompts or schedule.prompts_per_rollout) if scored else 0
        kept = [each for each in self.callbacks if isinstance(each, (StepTimer, HybridAdapterSetup, GracefulStop))]  # type: ignore[attr-defined]
        callbacks = [adapter.with_random_scores() if each is adapter else each for each in kept]
        if self.is_global_zero:
            say(f"One step: {schedule.prompts_per_rollout} prompts x {schedule.samples_per_prompt} completions ...")
        _DoctorTrainer(**{**self._flags, "callbacks": [*callbacks, doctor]}).fit(policy, datamodule=data)
        if not self.is_global_zero:
            return
        steps, every = float(self.max_steps), self.val_check_interval if self.limit_val_batches else None
        if steps < 0:  # limited by epochs alone
            rollouts = len(data.train_prompts) // schedule.prompts_per_rollout
            epoch = rollouts * schedule.minibatches_per_rollout * schedule.epochs_per_rollout
            steps = float("inf") if (self.max_epochs or -1) < 0 else float((self.max_epochs or 0) * epoch)
        validations = 0 if every is None else 1 + max(1, int(steps // every) if type(every) is int and steps < 1e12 else 1)
        doctor.report(policy, data, steps, validations, scored_prompts)
        doctor.found += self._memory_of_run(policy, adapter, data)
        for finding in doctor.found:
            say(f"{finding.level.capitalize()}: {finding}")
        first = cause(doctor.found)
        if any(finding.level == "error" for finding in doctor.found):
            raise DiagnosisError(f"nothing can be learned: {first}")
        say("Nothing was found that keeps this run from learning" if first is None else f"The run may fail: {first}")

    def _memory_of_run(self, model: PolicyModule, adapter: HybridAdapterSetup, datamodule: PromptDataModule) -> list[Finding]:
        """Print the run's peak memory and the available memory."""
        try:
            settings = RunSettings.of(model, adapter, datamodule, TrainerFlags.of_trainer(self))
            method = plan_method(settings)
        except HybridLightningError as error:
            say(f"{'memory':<16}cannot be planned: {error}")
            return []
        say(f"{'memory':<16}{verdict(method, settings)}")
        free = room(settings)
        return [] if free is None else of_memory(taken(method, settings), free, method.peak_phase)

    def plan(
        self,
        model: Any,
        datamodule: LightningDataModule | None = None,
        *,
        flags: TrainerFlags,
        fit: bool = False,
        prompt_tokens: int | None = None,
        device_gib: float | None = None,
    ) -> None:
        """Print how much memory a run will need, and whether it fits; reads only the model's config and loads no weights.

        Args:
            model: The policy; its weights need not be loaded.
            datamodule: Its data, read only to find the length of prompts.
            flags: Trainer flags of the planned run.
            fit: Whether to find the fewest changes that make the run fit.
            prompt_tokens: Tokens of each prompt; None for data.max_prompt_tokens, or else the longest training prompt.
            device_gib: Memory of each device in GiB (a GPU, unless trainer.accelerator=cpu); None for this machine's.

        Raises:
            ConfigError: If the callback HybridAdapterSetup is missing, the model is not a PolicyModule, a value is invalid, or no
                changes make the run fit.
            ModelError: If the model cannot be found.
        """
        adapter, show = _adapter_of(self, "plan"), partial(console().print, soft_wrap=True)
        if not isinstance(model, PolicyModule):
            kind = type(model).__name__
            raise ConfigError(f"plan works only for PolicyModule, but model is a {kind}; give a config with a PolicyModule")
        settings = RunSettings.of(model, adapter, datamodule, flags, prompt_tokens)
        methods = plan_memory(settings)
        own = next(method for method in methods if method.method == own_method(settings))
        show(memory_title(methods, settings))
        console().print(memory_table(methods, settings))
        show(memory_notes(methods, settings))
        if (gathers := gathers_note(own, settings)) is not None:
            show(gathers)
        problem, free = why_not_fitting(settings, own), room(settings)
        show(f"Such a run is refused: {problem}" if problem is not None else verdict(own, settings))
        if not fit:
            if free is not None and taken(own, settings) > free:
                show("--fit looks for the fewest changes with which it fits")
            return
        if free is None:
            raise ConfigError("--fit needs the memory of a device; give --device_gib")
        changes, fitted = find_changes(settings, model.task.needs_start_policy)
        if changes:
            console().print(memory_table([replace(own, method="as it is"), replace(fitted, method="changed")], settings))
            show("\n".join(f"{change.overrides} costs {change.cost}" for change in changes))
            show(verdict(fitted, settings))
        if taken(fitted, settings) > free:
            raise ConfigError(
                "no changes make this model fit on this device; use a smaller model or shorter completions, or split the model "
                "over devices (--config configs/strategy/fsdp.yaml)"
            )
        if changes:
            show(f"Add to the command: {' '.join(change.overrides for change in changes)}")


class _DoctorTrainer(Trainer):
    """The Trainer of `doctor`: a run of one step with a Trainer's flags, which validates and writes nothing."""

    command = "doctor"

    def __init__(self, **flags: Any) -> None:
        limits = {"max_steps": 1, "max_epochs": None, "max_time": None, "limit_val_batches": 0, "num_sanity_val_steps": 0}
        unwritten = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "fast_dev_run": False}
        super().__init__(**{**flags, **limits, **unwritten})
        self.fast_dev_run = True  # for callbacks: no folder; as a flag, Lightning would also limit the step's micro-batches


def _any(callbacks: list[Callback], kind: type[Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)


def _adapter_of(trainer: LightningTrainer, command: str) -> HybridAdapterSetup:
    """The callback that a command needs; ConfigError if there is none."""
    if (adapter := find_callback(trainer, HybridAdapterSetup)) is None:
        raise ConfigError(f"{command} needs an adapter; add the callback HybridAdapterSetup to trainer.callbacks")
    return adapter


def _examined(model: Any, datamodule: Any) -> tuple[PolicyModule, PromptDataModule]:
    """The module and data for `doctor`; ConfigError if it cannot examine them."""
    if not isinstance(model, PolicyModule) or not isinstance(datamodule, PromptDataModule):
        raise ConfigError(
            f"doctor examines rollouts of a PolicyModule on a PromptDataModule, not of a {type(model).__name__} on "
            f"a {type(datamodule).__name__}; for training on examples, check val/loss at the first validations of fit"
        )
    return model, datamodule


def _prepares_itself(datamodule: PromptDataModule) -> bool:
    """Whether a data module overrides how its data is prepared or set up."""
    kind = type(datamodule)
    return kind.setup is not PromptDataModule.setup or kind.prepare_data is not PromptDataModule.prepare_data


def _all_ours(model: LanguageModule, trainer: LightningTrainer) -> bool:
    """Whether a validation logs only metrics of this project's code and of Lightning's code."""
    parts = [model, model.task.loss, *trainer.callbacks]  # type: ignore[attr-defined]
    return all(type(part).__module__.partition(".")[0] in ("hybrid_lightning", "lightning") for part in parts)
