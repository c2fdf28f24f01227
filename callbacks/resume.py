"""Changed settings at a resume: each setting that differs from the checkpoint's is applied or refused.

A checkpoint holds the settings of the run that wrote it as plain data (see `run_settings.py`, which collects and flattens them).
At a resume they are compared, name by name, with those of the new run, before anything is scored or sampled. What happens with a
setting that differs is declared beside the option (see `Option`), and for Lightning's flags here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from hybrid_lightning.adapters.scorers import Scorer
from hybrid_lightning.callbacks.display import say
from hybrid_lightning.callbacks.run_settings import (
    arguments_of,
    describe_part,
    flatten_settings,
    imported_class,
    option_above,
    settings_of,
)
from hybrid_lightning.configurable import Configurable
from hybrid_lightning.errors import CheckpointError
from hybrid_lightning.options import ACCURACY, BEST, EPOCH, FIXED, MADE_BY, MEASURED, NOTHING, REFUSED, ROLLOUT, SIZES, Effects
from hybrid_lightning.training.training_data import restart_epoch

SETTINGS_KEY = "hybrid_lightning_settings"

# Lightning's flags: name -> effects of a change.
TRAINER: dict[str, Effects] = {
    "fast_dev_run": FIXED,
    **dict.fromkeys(("accumulate_grad_batches", "overfit_batches"), SIZES),
    "limit_train_batches": frozenset({EPOCH}),
    "limit_val_batches": ACCURACY,
    "precision": MADE_BY,  # a precision that trains another dtype is refused by the module
    **dict.fromkeys(("accelerator", "strategy", "devices", "num_nodes", "plugins", "sync_batchnorm"), NOTHING),
    **dict.fromkeys(("use_distributed_sampler", "deterministic", "benchmark", "inference_mode", "detect_anomaly"), NOTHING),
    **dict.fromkeys(("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time"), NOTHING),
    **dict.fromkeys(("limit_test_batches", "limit_predict_batches", "num_sanity_val_steps"), NOTHING),
    **dict.fromkeys(("val_check_interval", "check_val_every_n_epoch", "reload_dataloaders_every_n_epochs"), NOTHING),
    **dict.fromkeys(("gradient_clip_val", "gradient_clip_algorithm", "logger", "callbacks", "log_every_n_steps"), NOTHING),
    **dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), NOTHING),
    **dict.fromkeys(("enable_autolog_hparams", "profiler", "barebones", "default_root_dir", "model_registry"), NOTHING),
}
# Sections in which every option has the same effects.
WHOLE: dict[str, Effects] = {
    "seed_everything": FIXED,
    "training prompts": SIZES,
    "validation prompts": ACCURACY,
    "checkpoint": frozenset({BEST}),
    "samples": NOTHING,
    "divergence": NOTHING,
    "predictions": NOTHING,
}
# Arguments with which an optimizer needs other state than the checkpoint has.
_OPTIMIZER_STATE = {"amsgrad", "centered", "momentum", "optim_bits", "block_wise", "min_8bit_size", "percentile_clipping"}
_RATE_OF_FULL = "model.lr_full"
_OPTIMIZER_RATE = "model.optimizer.lr"  # has no effect, because each group of weights has its own learning rate


@dataclass(frozen=True)
class Change:
    """A change of a setting."""

    step: int  # optimizer step from which the new value holds
    name: str  # name as on the command line
    before: Any  # old value; None if it was null, or if there was none
    after: Any  # new value
    effects: Effects = NOTHING  # of the change; those of earlier resumes have had theirs

    def __str__(self) -> str:
        return f"{self.name} {_shown(self.before)} -> {_shown(self.after)}"


class Resume:
    """The settings of a run, and their changes at each resume."""

    def __init__(self) -> None:
        self.changes: list[Change] = []  # changes at this and at earlier resumes
        self._settings: dict[str, Any] = {}
        self._new: list[Change] | None = None  # changes at this resume; None before they are compared with a checkpoint

    def begin(self, trainer: Trainer, pl_module: LightningModule, adapter: Configurable) -> None:
        """Record the settings of a run that begins."""
        self.changes, self._settings, self._new = [], settings_of(trainer, pl_module, adapter), None

    def compare(self, checkpoint: Mapping[str, Any], trainer: Trainer) -> None:
        """Compare the settings with those in a checkpoint, the first time that this is called, and print what differs.

        A change that cannot be applied is a CheckpointError.
        """
        if self._new is not None:
            return
        self._new = changes_of(checkpoint, self._settings)
        check_changes(self._new)
        earlier = checkpoint.get(SETTINGS_KEY, {}).get("changes", [])
        self.changes = [*(Change(**change) for change in earlier), *self._new]
        for change in self._new if trainer.is_global_zero else ():
            say(f"changed at this resume: {change}")

    def settings_of_scores(self, pl_module: LightningModule, scorer: Scorer) -> dict[str, Any]:
        """The settings that the scores of a module's candidates depend on: name on the command line -> value."""
        settings = flatten_settings({name: self._settings[name] for name in ("model", "adapter") if name in self._settings})
        found = {} if "model" in self._settings else {f"model.{name}": value for name, value in arguments_of(pl_module).items()}
        for name, value in settings.items():
            option = option_above(name, settings)
            if option is None or option.scores or (option.updates and scorer.needs_update):
                found[name] = value
        return found

    def apply(self, checkpoint: dict[str, Any], trainer: Trainer) -> None:
        """Remove from a checkpoint that is being restored what the changes have made invalid."""
        effects = self._effects()
        if ROLLOUT in effects:
            count = _give_up_rollout(checkpoint)
            if count and trainer.is_global_zero:
                say(f"the rollout in progress is of before the change: its last {count} micro-batches are given up")
        states = checkpoint.get("callbacks", {})
        if MEASURED in effects and "RunSummary" in states:
            states["RunSummary"].update(before={}, after={}, validated_step=-1)
        if MEASURED in effects and "RunReport" in states:
            curves = states["RunReport"]["curves"]
            kept = {name: curve for name, curve in curves.items() if not name.startswith("val/")}
            states["RunReport"].update(first=None, last=None, curves=kept)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            state = states.get(callback.state_key)
            if state and isinstance(callback, EarlyStopping):
                state["patience"] = callback.patience  # otherwise Lightning would take it from the checkpoint
            if state and isinstance(callback, ModelCheckpoint) and BEST in effects:
                state.update(best_model_score=None, best_model_path="", best_k_models={}, current_score=None)
                state.update(kth_best_model_path="", kth_value=callback.kth_value)

    def begin_epoch(self, trainer: Trainer) -> None:
        """Begin the epoch anew if it now has another number of micro-batches. A second call changes nothing."""
        if EPOCH in self._effects():
            restart_epoch(trainer)

    def state(self) -> dict[str, Any]:
        """Settings and changes for the checkpoint, as plain data."""
        return {"settings": self._settings, "changes": self.record()}

    def record(self) -> list[dict[str, Any]]:
        """All changes as plain data."""
        return [{name: value for name, value in asdict(change).items() if name != "effects"} for change in self.changes]

    def _effects(self) -> set[str]:
        return {effect for change in self._new or [] for effect in change.effects}


def check_evaluated(checkpoint: Mapping[str, Any], adapter: Configurable) -> None:
    """Refuse settings of the adapter that contradict a checkpoint which is to be evaluated or exported."""
    changes = changes_of(checkpoint, {"adapter": describe_part(adapter, adapter._init_args)})
    _refuse([change for change in changes if REFUSED in change.effects and change.name != "adapter"])


# ---- comparing


def changes_of(checkpoint: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Change]:
    """All settings that differ from those of the run that wrote a checkpoint, in the sections that both have."""
    old = checkpoint.get(SETTINGS_KEY, {}).get("settings", {})  # none if the run had no HybridAdapterSetup
    sections = old.keys() & settings.keys()
    if "seed_everything" not in settings and settings["adapter"]["init_args"].get("plan"):
        sections -= {"adapter"}  # made in Python from a plan alone, and plans are compared by their digests
    before, after = (flatten_settings({name: side[name] for name in side if name in sections}) for side in (old, settings))
    if "seed_everything" not in sections:  # a Trainer made in Python does not keep all its arguments
        for name in [name for name in before.keys() ^ after.keys() if name.startswith("trainer.")]:
            before.pop(name, None)
            after.pop(name, None)
    differing = [name for name in {**before, **after} if _differ(name, before.get(name), after.get(name))]
    # If a part has another class, the arguments of the old class are not listed.
    classes = [name for name in differing if any(_is(name, other) for other in after if other != name)]
    gone = [name for name in differing if name not in after and any(_is(kind, name) for kind in classes)]
    step = checkpoint.get("global_step", 0)
    changed = [name for name in differing if name not in gone]
    changes = [Change(step, name, before.get(name), after.get(name), effects_of(name, after)) for name in changed]
    lora = next((change for change in changes if change.name == "model.lr_lora"), None)
    if lora is not None and before.get(_RATE_OF_FULL) is None and after.get(_RATE_OF_FULL) is None:  # it follows that of LoRA
        for group in (group for state in checkpoint.get("optimizer_states", []) for group in state["param_groups"]):
            if group.get("name") == "full":
                rate, new = group["initial_lr"], group["initial_lr"] * lora.after / lora.before
                changes.append(Change(step, _RATE_OF_FULL, float(f"{rate:.3g}"), float(f"{new:.3g}")))
    return changes


def _differ(name: str, before: Any, after: Any) -> bool:
    # The type matters: a limit of 1 is one batch, and a limit of 1.0 is all batches.
    return before != after or (name.startswith("trainer.") and type(before) is not type(after))


def effects_of(name: str, settings: Mapping[str, Any]) -> Effects:
    """The effects of a change of a setting, among flattened settings that have the classes of modules and parts."""
    section, _, rest = name.partition(".")
    option, _, below = rest.partition(".")
    if section == "trainer":
        return TRAINER.get(option, NOTHING)
    if section not in ("model", "adapter", "data"):
        return WHOLE.get(section, NOTHING)
    if not option:  # the class itself
        return NOTHING if section == "data" else FIXED
    if (section, option) == ("model", "optimizer") and below and below not in _OPTIMIZER_STATE:
        return NOTHING
    if (found := option_above(name, settings)) is not None:
        return found.at_resume
    return SIZES | ACCURACY if section == "model" else NOTHING  # an option of a user's own module


def check_changes(changes: Sequence[Change]) -> None:
    """Refuse changes that cannot be applied to a run that continues."""
    _refuse([change for change in changes if REFUSED in change.effects])
    for change in changes:
        if change.name == "trainer.max_steps" and 0 <= change.after < change.step:
            raise CheckpointError(
                f"trainer.max_steps={change.after} is less than the {change.step} steps that the checkpoint has; give how many "
                "the run is to have in all"
            )
        if change.name == _OPTIMIZER_RATE:
            raise CheckpointError(
                f"{_OPTIMIZER_RATE}={_shown(change.after)} has no effect, since each group of weights has a rate of its own; "
                "give --model.lr_full and --model.lr_lora"
            )


def _refuse(changes: list[Change]) -> None:
    names = {change.name for change in changes}
    changes = [change for change in changes if not any(name != change.name and _is(name, change.name) for name in names)]
    if changes:
        was = ", and ".join(f"{c.name}={_shown(c.before)}, but it is {_shown(c.after)} now" for c in changes)
        give = " ".join(f"--{change.name}={_given(change.before)}" for change in changes)
        raise CheckpointError(
            f"the checkpoint was trained with {was}; give {give}, or start a new run (without --ckpt_path; an exported model "
            "continues trained weights)"
        )


def _is(name: str, other: str) -> bool:
    """Whether `other` is the setting `name`, or a setting below it."""
    return other == name or other.startswith(f"{name}.")


# ---- showing


def _given(value: Any) -> str:
    """A value as it is given on the command line, where only our classes have short names."""
    return value if isinstance(value, str) and not value.startswith(f"{__name__.partition('.')[0]}.") else _shown(value)


def _shown(value: Any) -> str:
    """A value as YAML in one line; a class by its short name."""
    kind = imported_class(value) if isinstance(value, str) else None
    text = yaml.safe_dump(value if kind is None else kind.__name__, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n...\n").strip()


# ---- applying


def _give_up_rollout(checkpoint: Mapping[str, Any]) -> int:
    """Remove the rest of a rollout from a checkpoint, so that the loader draws a new one. Returns its number of micro-batches."""
    loaders = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
    count = 0
    for state in (state for state in loaders if isinstance(state, dict) and "ranks" in state):
        count += len(state["ranks"][0]["pending"])
        if state["ahead"]:  # their prompts are drawn again
            (state["epoch"], state["next_prompt"]), state["ahead"] = state["ahead"][0], []
        for rank in state["ranks"]:
            rank["pending"], rank["ahead"] = [], []
    return count
