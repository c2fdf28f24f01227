"""Input and output of an export.

- `TrainedPolicy`: plan, trained weights and base model (`Pretrained`), with the model card's facts about training (`Training`).
- `ExportForm`: the form of an export. Each form is a class, which `--form` names on the command line.
- `peft_weights`: the trained weights under PEFT's names in files. A checkpoint has
  `model.base_model.model.NAME.lora_A.default.weight` and `...NAME.modules_to_save.default.weight`; a PEFT file has
  `base_model.model.NAME.lora_A.weight` and `base_model.model.NAME.weight`. NAME is the module's name in the base model.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hybrid_lightning.adapters.lora_settings import ADAPTER
from hybrid_lightning.adapters.plan import AdapterPlan
from hybrid_lightning.data import ChatFormat
from hybrid_lightning.errors import CheckpointError, ConfigError
from hybrid_lightning.model.pretrained import Pretrained
from hybrid_lightning.rollout.interface import PEFT_PREFIX
from hybrid_lightning.shared.configurable import Configurable

_FULL = f".modules_to_save.{ADAPTER}."


@dataclass(frozen=True)
class Training:
    """The model card's facts about the training."""

    steps: int = 0  # optimizer steps
    arguments: Mapping[str, Any] = field(default_factory=dict)  # constructor arguments of the module, in plain types
    data: Mapping[str, Any] | None = None  # class_path and init_args of the data source
    chat: bool = False  # whether prompts were messages
    before: Mapping[str, float] = field(default_factory=dict)  # validation metrics of the start policy
    after: Mapping[str, float] = field(default_factory=dict)  # validation metrics of the last validation
    validated_step: int | None = None  # optimizer steps before that validation


@dataclass(frozen=True)
class TrainedPolicy:
    """A plan, the trained weights, and the model that was adapted.

    An export reads the model's weights again, since the weights in memory may be quantized or sharded.
    """

    plan: AdapterPlan
    weights: Mapping[str, Tensor]  # named as in a PEFT file (see `peft_weights`); not sharded, on the CPU
    base: Pretrained
    training: Training = field(default_factory=Training)


class ExportForm(Configurable, ABC):
    """Writes a policy into a folder.

    Your own form implements `write` and `how_to_load`.
    """

    name: str  # name of the folder inside a run folder's `export`
    library: str  # `library_name` in the model card
    relation: str  # `base_model_relation` in the model card

    def check(self, plan: AdapterPlan) -> None:
        """Check that this form can hold what a plan trains. Called before training, if the plan is known.

        Raises:
            ConfigError: If it cannot. Most forms never raise.
        """

    def weights_dtype(self, policy: TrainedPolicy) -> str | None:
        """Dtype of the weights that this form writes, for the screen and the model card; None leaves it out."""
        return None

    @abstractmethod
    def write(self, policy: TrainedPolicy, folder: Path) -> None:
        """Write weights, configs and tokenizer into an empty folder; the caller writes the model card and the plan."""

    @abstractmethod
    def how_to_load(self, policy: TrainedPolicy) -> str:
        """Python code for the model card that loads the policy, with the exported folder as the working directory."""


def base_model_of(arguments: Mapping[str, Any]) -> Pretrained:
    """Base model of a module such as `PolicyModule`, from the module's constructor arguments.

    Raises:
        ConfigError: If they do not name a model.
        ModelError: If the model cannot be found.
    """
    if not isinstance(arguments.get("model"), str):
        raise ConfigError(
            "cannot export: the module does not name its base model; give it a hyper-parameter 'model' (folder or hub id), as in "
            "PolicyModule"
        )
    options = ("revision", "dtype", "chat_template", "chat_template_kwargs")
    given: dict[str, Any] = {name: arguments[name] for name in options if arguments.get(name) is not None}
    return Pretrained(arguments["model"], **given)


def training_of(
    steps: int, arguments: Mapping[str, Any], summary: Mapping[str, Any] | None = None, datamodule: Any = None
) -> Training:
    """Collect the model card's facts about the training; `summary` is the state of a `RunSummary`, with validation metrics."""
    summary = summary or {}
    source: Any = getattr(datamodule, "source", None)
    return Training(
        steps=steps,
        arguments={name: value for name, value in arguments.items() if not name.startswith("_")},
        data=source.to_config() if hasattr(source, "to_config") else None,
        chat=isinstance(getattr(datamodule, "format", None), ChatFormat),
        before=summary.get("before", {}),
        after=summary.get("after", {}),
        validated_step=summary.get("validated_step"),
    )


def is_adapter_weight(name: str) -> bool:
    """Whether a name in a state dict belongs to an adapter's weight, not to the frozen base model."""
    return PEFT_PREFIX in name and (_FULL in name or ".lora_" in name)


def peft_weights(state: Mapping[str, Tensor], plan: AdapterPlan, source: str) -> dict[str, Tensor]:
    """Select the adapter's weights from the state dict of the adapted model, or of a module that contains it.

    Renames them as in PEFT's files. `source` names the origin of the state dict in error messages.

    Raises:
        CheckpointError: If the adapter's weights do not match the plan.
    """
    weights = {_peft_name(name): weight for name, weight in state.items() if is_adapter_weight(name)}
    expected = set(_expected(plan))
    # Not every module has biases; experts' biases are named like their weights.
    full = tuple(f"{PEFT_PREFIX}{name}." for name in plan.full_modules)
    biases = {name for name in weights if name.startswith(full) and name.endswith("bias")}
    different = sorted((expected ^ weights.keys()) - biases)
    if different:
        verb = "does not have" if different[0] in expected else "has, against its plan,"
        raise CheckpointError(f"{source} {verb} the trained weight {different[0]!r}; it is damaged or incomplete")
    return weights


def _peft_name(name: str) -> str:
    name = name[name.index(PEFT_PREFIX) :]
    name = name.replace(_FULL, ".").replace(f".lora_magnitude_vector.{ADAPTER}.weight", ".lora_magnitude_vector")
    return name.replace(f".lora_A.{ADAPTER}.", ".lora_A.").replace(f".lora_B.{ADAPTER}.", ".lora_B.")


def _expected(plan: AdapterPlan) -> Iterator[str]:
    """Names of the weights that the plan trains, without biases."""
    for module in plan.candidates:
        if module.mode == "full":
            yield from (f"{PEFT_PREFIX}{module.name}.{part}" for part in module.experts or ["weight"])
        elif module.mode == "lora":
            for name in module.lora_layers().values():
                yield from (f"{PEFT_PREFIX}{name}.lora_A.weight", f"{PEFT_PREFIX}{name}.lora_B.weight")
                if plan.lora.use_dora:
                    yield f"{PEFT_PREFIX}{name}.lora_magnitude_vector"
