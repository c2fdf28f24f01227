"""Changed settings at a resume: each setting that differs from the checkpoint's is applied or refused.

A checkpoint holds the settings of the run that wrote it as plain data (see `run_settings.py`, which collects and flattens them).
At a resume they are compared, name by name, with those of the new run, before anything is scored or sampled. The tables below say
what happens with each setting that differs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from hybrid_lightning.callbacks.display import console
from hybrid_lightning.callbacks.run_settings import describe_part, earlier_settings, flatten_settings, imported_class, settings_of
from hybrid_lightning.errors import CheckpointError
from hybrid_lightning.policy.examples import ExampleModule

SETTINGS_KEY = "hybrid_lightning_settings"

# Effects of a change: what begins anew.
ROLLOUT = "rollout"  # the rollout in progress is given up, because its micro-batches were made with the old setting
EPOCH = "epoch"  # Lightning's epoch, which now has another number of micro-batches
MEASURED = "measured"  # accuracies so far, which cannot be compared with those measured from now on
BEST = "best"  # which checkpoint is the best, for the same reason
REFUSED = "refused"  # the change is not possible

Effects = frozenset[str]
_NOTHING: Effects = frozenset()
_MADE_BY: Effects = frozenset({ROLLOUT})
_FIXED: Effects = frozenset({REFUSED})
_SIZES: Effects = frozenset({ROLLOUT, EPOCH})
_ACCURACY: Effects = frozenset({MEASURED, BEST})

# Option -> effects of a change of the option, or of an option below it as in `model.loss.clip_low`.
MODEL: dict[str, Effects] = {
    **dict.fromkeys(("dtype", "quantization", "seed"), _FIXED),
    # Another model is refused by the digest of its weights, but the same model may have been moved.
    **dict.fromkeys(("model", "revision"), _NOTHING),
    # Another class of optimizer, and arguments that change its state, are refused by `effects_of`.
    **dict.fromkeys(("optimizer", "lr_full", "lr_lora", "schedule"), _NOTHING),
    **dict.fromkeys(("max_tokens_per_micro_batch", "gradient_checkpointing"), _NOTHING),
    **dict.fromkeys(("loss", "advantage", "correction", "token_mask", "dynamic_sampling", "samples_per_prompt"), _MADE_BY),
    **dict.fromkeys(("mask_truncated_completions", "attn_implementation"), _MADE_BY),
    **dict.fromkeys(("prompts_per_rollout", "minibatches_per_rollout", "epochs_per_rollout", "examples_per_step"), _SIZES),
    **dict.fromkeys(("chat_template", "chat_template_kwargs", "sampler", "reward"), _MADE_BY | _ACCURACY),
    "eval_samples": _ACCURACY,
}
ADAPTER: dict[str, Effects] = {
    **dict.fromkeys(("budget", "scorer", "gradients", "target_modules", "calibration_prompts"), _FIXED),
    **dict.fromkeys(("rank", "rank_pattern", "alpha", "dropout", "use_dora", "use_rslora"), _FIXED),
    "plan": _NOTHING,  # plans are compared by their digests
    "keep_start_weights": _NOTHING,  # these are the weights of the model, which is loaded in any case
}
# Arguments of rollout engines that say where and how fast completions are made, and not which.
_WHERE_SAMPLED = frozenset(
    {"address", "engine_args", "give_up_after", "gpu_memory_utilization", "max_model_len", "sleep", "timeout", "urls"}
)
# Changes of the data have effects only through the prompts ("training prompts" and "validation prompts" below).
DATA: dict[str, Effects] = dict.fromkeys(
    ("source", "format", "max_prompt_tokens", "validation_prompts", "test_prompts", "eval_batch_size", "seed"), _NOTHING
)
TRAINER: dict[str, Effects] = {
    "fast_dev_run": _FIXED,
    **dict.fromkeys(("accumulate_grad_batches", "overfit_batches"), _SIZES),
    "limit_train_batches": frozenset({EPOCH}),
    "limit_val_batches": _ACCURACY,
    "precision": _MADE_BY,  # a precision that trains another dtype is refused by the module
    **dict.fromkeys(("accelerator", "strategy", "devices", "num_nodes", "plugins", "sync_batchnorm"), _NOTHING),
    **dict.fromkeys(("use_distributed_sampler", "deterministic", "benchmark", "inference_mode", "detect_anomaly"), _NOTHING),
    **dict.fromkeys(("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time"), _NOTHING),
    **dict.fromkeys(("limit_test_batches", "limit_predict_batches", "num_sanity_val_steps"), _NOTHING),
    **dict.fromkeys(("val_check_interval", "check_val_every_n_epoch", "reload_dataloaders_every_n_epochs"), _NOTHING),
    **dict.fromkeys(("gradient_clip_val", "gradient_clip_algorithm", "logger", "callbacks", "log_every_n_steps"), _NOTHING),
    **dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), _NOTHING),
    **dict.fromkeys(("enable_autolog_hparams", "profiler", "barebones", "default_root_dir", "model_registry"), _NOTHING),
}
# Sections in which every option has the same effects.
WHOLE: dict[str, Effects] = {
    "seed_everything": _FIXED,
    "training prompts": _SIZES,
    "validation prompts": _ACCURACY,
    "checkpoint": frozenset({BEST}),
    "samples": _NOTHING,
    "divergence": _NOTHING,
    "predictions": _NOTHING,
}
_OPTIONS = {"model": MODEL, "adapter": ADAPTER, "data": DATA, "trainer": TRAINER}
# Arguments with which an optimizer needs other state than the checkpoint has.
_OPTIMIZER_STATE = {"amsgrad", "centered", "momentum", "optim_bits", "block_wise", "min_8bit_size", "percentile_clipping"}
_OPTIMIZER_RATE = "model.optimizer.lr"  # has no effect, because each group of weights has its own learning rate
# Settings that must be the checkpoint's if nothing is trained.
_OF_THE_PLAN = tuple(f"adapter.{name}" for name, effects in ADAPTER.items() if REFUSED in effects)


@dataclass(frozen=True)
class Change:
    """A change of a setting."""

    step: int  # optimizer step from which the new value holds
    name: str  # name as on the command line
    before: Any  # old value; None if it was null, or if there was none
    after: Any  # new value

    def __str__(self) -> str:
        return f"{self.name} {_shown(self.before)} -> {_shown(self.after)}"


class Resume:
    """The settings of a run, and their changes at each resume."""

    def __init__(self) -> None:
        self.changes: list[Change] = []  # changes at this and at earlier resumes
        self._settings: dict[str, Any] = {}
        self._new: list[Change] | None = None  # changes at this resume; None before they are compared with a checkpoint

    def begin(self, trainer: Trainer, pl_module: LightningModule, adapter: Callback) -> None:
        """Record the settings of a run that begins."""
        self.changes, self._settings, self._new = [], settings_of(trainer, pl_module, adapter), None

    def compare(self, checkpoint: Mapping[str, Any], trainer: Trainer) -> None:
        """Compare the settings with those in a checkpoint, the first time that this is called, and print what differs.

        Raises:
            CheckpointError: If a change cannot be applied.
        """
        if self._new is not None:
            return
        changes = changes_of(checkpoint, self._settings)
        check_changes(changes)
        if SETTINGS_KEY not in checkpoint:
            _say(
                trainer,
                "the checkpoint was written by an earlier version, which saved fewer settings: changes of data, trainer and "
                "callbacks are applied, but neither named nor recorded",
            )
        earlier = checkpoint.get(SETTINGS_KEY, {}).get("changes", [])
        self._new, self.changes = changes, [*(Change(**change) for change in earlier), *changes]
        for change in changes:
            _say(trainer, f"changed at this resume: {change}")

    def apply(self, checkpoint: dict[str, Any], trainer: Trainer) -> None:
        """Remove from a checkpoint that is being restored what the changes have made invalid."""
        effects = self._effects()
        if ROLLOUT in effects:
            count = _give_up_rollout(checkpoint)
            if count:
                _say(trainer, f"the rollout in progress is of before the change: its last {count} micro-batches are given up")
        if isinstance(trainer.lightning_module, ExampleModule) and any(_is("model.loss", c.name) for c in self._new or []):
            effects |= _ACCURACY  # the held-out loss is measured with the new loss
        states = checkpoint.get("callbacks", {})
        if MEASURED in effects and "RunSummary" in states:
            states["RunSummary"].update(before={}, after={}, validated_step=-1)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            state = states.get(callback.state_key)
            if state and isinstance(callback, EarlyStopping):
                state["patience"] = callback.patience  # otherwise Lightning would take it from the checkpoint
            if state and isinstance(callback, ModelCheckpoint) and BEST in effects:
                state.update(best_model_score=None, best_model_path="", best_k_models={}, current_score=None)
                state.update(kth_best_model_path="", kth_value=callback.kth_value)

    @property
    def epoch_begins_anew(self) -> bool:
        """Whether an epoch now has another number of micro-batches."""
        return EPOCH in self._effects()

    def state(self) -> dict[str, Any]:
        """Settings and changes for the checkpoint, as plain data."""
        return {"settings": self._settings, "changes": self.record()}

    def record(self) -> list[dict[str, Any]]:
        """All changes as plain data."""
        return [asdict(change) for change in self.changes]

    def _effects(self) -> set[str]:
        return {effect for change in self._new or [] for effect in effects_of(change.name)}


def check_evaluated(checkpoint: Mapping[str, Any], adapter: Callback) -> None:
    """Refuse settings of the adapter that contradict a checkpoint which is to be evaluated or exported.

    Raises:
        CheckpointError: If there are such settings; the message names them.
    """
    changes = changes_of(checkpoint, {"adapter": describe_part(adapter, getattr(adapter, "_init_args", {}))})
    _refuse([change for change in changes if any(_is(name, change.name) for name in _OF_THE_PLAN)])


# ---- comparing


def changes_of(checkpoint: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Change]:
    """All settings that differ from those of the run that wrote a checkpoint, in the sections that both have."""
    saved = checkpoint.get(SETTINGS_KEY)
    old = earlier_settings(checkpoint, settings) if saved is None else saved["settings"]
    sections = old.keys() & settings.keys()
    if "seed_everything" not in settings and settings["adapter"]["init_args"].get("plan"):
        sections -= {"adapter"}  # made in Python from a plan alone, and plans are compared by their digests
    before, after = (flatten_settings({name: side[name] for name in side if name in sections}) for side in (old, settings))
    if "seed_everything" not in sections:  # a Trainer made in Python does not keep all its arguments
        for name in [name for name in before.keys() ^ after.keys() if name.startswith("trainer.")]:
            before.pop(name, None)
            after.pop(name, None)
    differing = [name for name in dict.fromkeys([*before, *after]) if _differ(name, before.get(name), after.get(name))]
    # If a part has another class, the arguments of the old class are not listed.
    classes = [name for name in differing if any(_is(name, other) for other in after if other != name)]
    gone = [name for name in differing if name not in after and any(_is(kind, name) for kind in classes)]
    step = checkpoint.get("global_step", 0)
    return [Change(step, name, before.get(name), after.get(name)) for name in differing if name not in gone]


def _differ(name: str, before: Any, after: Any) -> bool:
    # The type matters: a limit of 1 is one batch, and a limit of 1.0 is all batches.
    return before != after or (name.startswith("trainer.") and type(before) is not type(after))


def effects_of(name: str) -> Effects:
    """The effects of a change of a setting."""
    section, _, rest = name.partition(".")
    option, _, below = rest.partition(".")
    if section not in _OPTIONS:
        return WHOLE.get(section, _NOTHING)
    if not option:  # the class itself
        return _NOTHING if section == "data" else _FIXED
    if (section, option) == ("model", "optimizer"):
        return _FIXED if not below or below in _OPTIMIZER_STATE else _NOTHING
    if (section, option) == ("model", "sampler") and below.partition(".")[0] in _WHERE_SAMPLED:
        return _NOTHING
    unknown = _SIZES | _ACCURACY if section == "model" else _NOTHING  # for arguments of a user's own module
    return _OPTIONS[section].get(option, unknown)


def check_changes(changes: Iterable[Change]) -> None:
    """Refuse changes that cannot be applied to a run that continues.

    Raises:
        CheckpointError: If there are such changes; the message has each setting, its old and new value, and what to give.
    """
    changes = list(changes)
    _refuse([change for change in changes if REFUSED in effects_of(change.name)])
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


def _say(trainer: Trainer, line: str) -> None:
    if trainer.is_global_zero:
        console().print(line, soft_wrap=True, markup=False, highlight=False)


def _give_up_rollout(checkpoint: Mapping[str, Any]) -> int:
    """Remove the rest of a rollout from a checkpoint, so that the loader draws a new one. Returns its number of micro-batches."""
    loaders = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
    count = 0
    for state in (state for state in loaders if isinstance(state, dict) and "ranks" in state):
        count += len(state["ranks"][0]["pending"])
        for rank in state["ranks"]:
            rank["pending"] = []
    return count
