"""Changed settings at a resume: each change is refused, or the rollout in progress is dropped and the epoch starts again.

A checkpoint holds the settings of the run that wrote it as plain data (see `run_settings.py`, which collects and flattens them).
At a resume they are compared, name by name, with the new run's settings, before anything is scored or sampled. Settings that do
not affect rollouts and updates, such as `trainer.max_steps`, a logger or a callback, simply take effect.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from hybrid_lightning.callbacks.display import say
from hybrid_lightning.callbacks.run_settings import describe_part, flatten_settings, settings_of
from hybrid_lightning.errors import CheckpointError
from hybrid_lightning.shared.configurable import Configurable, imported_class
from hybrid_lightning.training.checkpoint import give_up_rollout
from hybrid_lightning.training.example_module import ExampleModule

SETTINGS_KEY = "hybrid_lightning_settings"

# Optimizer arguments that need different state than the checkpoint has.
_OPTIMIZER_STATE = ("amsgrad", "centered", "momentum", "optim_bits", "block_wise", "min_8bit_size", "percentile_clipping")
# Settings that cannot change, besides the adapter's.
_FIXED = {
    *("seed_everything", "trainer.fast_dev_run", "model", "model.dtype", "model.quantization", "model.seed", "model.optimizer"),
    *(f"model.optimizer.{name}" for name in _OPTIMIZER_STATE),
}
# Adapter settings that may change: plans are compared by their digests, and start weights are loaded with the model.
_FREE_OF_ADAPTER = ("adapter.plan", "adapter.keep_start_weights")
# Flags that determine which micro-batches exist, or how they are made.
_OF_BATCHES = ("accumulate_grad_batches", "overfit_batches", "limit_train_batches", "precision")
# Options of `model` for where the model is (it is compared by its weights), and for where and how fast completions are made.
_PLACES = {
    "model.model",
    *(f"model.sampler.{name}" for name in ("urls", "address", "timeout", "give_up_after")),
    *(f"model.sampler.{name}" for name in ("gpu_memory_utilization", "max_model_len", "sleep", "engine_args")),
    *(f"model.episodes.{name}" for name in ("workers", "step_timeout_s", "max_failed_share")),
    *(f"model.agent.{name}" for name in ("concurrency", "timeout_s", "host", "port")),
}
# What accuracies depend on besides the policy: accuracies measured with another value are not comparable.
_MEASURED_BY = (
    *("validation prompts", "trainer.limit_val_batches", "model.reward", "model.sampler", "model.eval_samples"),
    *("model.environment", "model.agent", "model.episodes"),
    *("model.turn_template", "model.chat_template", "model.chat_template_kwargs"),
)
_RATE_OF_FULL = "model.lr_full"
_OPTIMIZER_RATE = "model.optimizer.lr"  # has no effect: each group of weights has its own learning rate


@dataclass(frozen=True)
class Change:
    """A change of a setting."""

    step: int  # optimizer step from which the new value applies
    name: str  # name as on the command line
    before: Any  # old value; None if it was null or absent
    after: Any  # new value

    def __str__(self) -> str:
        return f"{self.name} {_shown(self.before)} -> {_shown(self.after)}"


@runtime_checkable
class Measuring(Protocol):
    """A callback that has measurements in its saved state."""

    def without_measurements(self, state: dict[str, Any]) -> dict[str, Any]:
        """A saved state without accuracies, which cannot be compared with those of a run with other problems or rewards."""


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
        """Compare the settings with those in a checkpoint, on the first call only, and print the differences.

        A change that cannot be applied raises a CheckpointError.
        """
        if self._new is not None:
            return
        self._new = changes_of(checkpoint, self._settings)
        check_changes(self._new)
        earlier = checkpoint.get(SETTINGS_KEY, {}).get("changes", [])
        self.changes = [*(Change(**change) for change in earlier), *self._new]
        for change in self._new if trainer.is_global_zero else ():
            say(f"changed at this resume: {change}")

    def apply(self, checkpoint: dict[str, Any], trainer: Trainer) -> None:
        """Remove the entries that the changes have made invalid from a checkpoint that is being restored."""
        changed = [change.name for change in self._new or ()]
        if any(_gives_up_rollout(name) for name in changed):
            if trainer.is_global_zero:
                say("the change discards the rest of the rollout in progress, and the epoch starts over")
            give_up_rollout(checkpoint)
        held_out = ("model.loss",) if isinstance(trainer.lightning_module, ExampleModule) else ()  # its loss is measured by this
        measured_by = (*_MEASURED_BY, *held_out)
        measured = any(_is(option, name) for option in measured_by for name in changed if name not in _PLACES)
        states = checkpoint.get("callbacks", {})
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            key = callback.state_key
            if states.get(key) and isinstance(callback, (EarlyStopping, ModelCheckpoint)):
                best = measured or any(_is("checkpoint", name) for name in changed)
                states[key] |= _of_lightning(callback, best)
            elif states.get(key) and measured and isinstance(callback, Measuring):
                states[key] = callback.without_measurements(states[key])

    def state(self) -> dict[str, Any]:
        """Settings and changes for the checkpoint, as plain data."""
        return {"settings": self._settings, "changes": self.record()}

    def record(self) -> list[dict[str, Any]]:
        """All changes as plain data."""
        return [asdict(change) for change in self.changes]


def _of_lightning(callback: EarlyStopping | ModelCheckpoint, best_changes: bool) -> dict[str, Any]:
    """New values in the saved state of Lightning's callbacks, which would restore options and the best checkpoint of old."""
    if isinstance(callback, EarlyStopping):
        return {"patience": callback.patience}
    best: dict[str, Any] = {"best_model_score": None, "best_model_path": "", "best_k_models": {}, "current_score": None}
    return {**best, "kth_best_model_path": "", "kth_value": callback.kth_value} if best_changes else {}


def check_evaluated(checkpoint: Mapping[str, Any], adapter: Configurable) -> None:
    """Refuse adapter settings that contradict a checkpoint to be evaluated or exported."""
    changes = changes_of(checkpoint, {"adapter": describe_part(adapter, adapter._init_args)})
    _refuse([change for change in changes if change.name != "adapter"])


# ---- comparing


def changes_of(checkpoint: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Change]:
    """All settings that differ from the settings of the run that wrote a checkpoint, in the sections that both have."""
    old = checkpoint.get(SETTINGS_KEY, {}).get("settings", {})  # empty if the run had no HybridAdapterSetup
    sections = old.keys() & settings.keys()
    if "seed_everything" not in settings and settings["adapter"]["init_args"].get("plan"):
        sections -= {"adapter"}  # made in Python from a plan alone, and plans are compared by their digests
    before, after = (flatten_settings({name: side[name] for name in side if name in sections}) for side in (old, settings))
    if "seed_everything" not in sections:  # a Trainer made in Python does not keep all its arguments
        for name in [name for name in before.keys() ^ after.keys() if name.startswith("trainer.")]:
            before.pop(name, None)
            after.pop(name, None)
    differing = [name for name in {**before, **after} if _differ(name, before.get(name), after.get(name))]
    # If a part has another class, the old class's arguments are not listed.
    classes = [name for name in differing if any(_is(name, other) for other in after if other != name)]
    gone = [name for name in differing if name not in after and any(_is(kind, name) for kind in classes)]
    step = checkpoint.get("global_step", 0)
    changed = [name for name in differing if name not in gone]
    changes = [Change(step, name, before.get(name), after.get(name)) for name in changed]
    lora = next((change for change in changes if change.name == "model.lr_lora"), None)
    if lora is not None and before.get(_RATE_OF_FULL) is None and after.get(_RATE_OF_FULL) is None:  # it follows the rate of LoRA
        for group in (group for state in checkpoint.get("optimizer_states", []) for group in state["param_groups"]):
            if group.get("name") == "full":
                rate, new = group["initial_lr"], group["initial_lr"] * lora.after / lora.before
                changes.append(Change(step, _RATE_OF_FULL, float(f"{rate:.3g}"), float(f"{new:.3g}")))
    return changes


def _differ(name: str, before: Any, after: Any) -> bool:
    # The type matters: a limit of 1 means one batch, a limit of 1.0 means all batches.
    return before != after or (name.startswith("trainer.") and type(before) is not type(after))


def _is_refused(name: str) -> bool:
    if _is("adapter", name):
        return name not in _FREE_OF_ADAPTER
    return name in _FIXED or _is("model.quantization", name)


def _gives_up_rollout(name: str) -> bool:
    """Whether micro-batches made before and after the change of a setting may differ."""
    section, _, option = name.partition(".")
    return option in _OF_BATCHES if section == "trainer" else section == "model" and name not in _PLACES


def check_changes(changes: Sequence[Change]) -> None:
    """Refuse changes that cannot be applied to a run that continues."""
    _refuse(changes)
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


def _refuse(changes: Sequence[Change]) -> None:
    changes = [change for change in changes if _is_refused(change.name)]
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
    """A value as given on the command line, where only classes of this package have short names."""
    return value if isinstance(value, str) and not value.startswith(f"{__name__.partition('.')[0]}.") else _shown(value)


def _shown(value: Any) -> str:
    """A value as YAML in one line; a class by its short name."""
    kind = imported_class(value) if isinstance(value, str) else None
    text = yaml.safe_dump(value if kind is None else kind.__name__, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n...\n").strip()
