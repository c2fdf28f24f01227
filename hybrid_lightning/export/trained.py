"""Trained weights by the names that PEFT gives them in a file.

A checkpoint has `model.base_model.model.NAME.lora_A.default.weight` and `...NAME.modules_to_save.default.weight`, a PEFT file
`base_model.model.NAME.lora_A.weight` and `base_model.model.NAME.weight`, where NAME is that of the module in the base.

`TrainedPolicy`: all that an export needs, wherever it comes from.

`ExportForm`: what a policy is exported as; one class for each form, named on the command line by `--form`.
"""

import json
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from hybrid_lightning.adapters.lora_settings import ADAPTER
from hybrid_lightning.adapters.plan import AdapterPlan, PlannedModule
from hybrid_lightning.configurable import Configurable
from hybrid_lightning.errors import CheckpointError, ConfigError, ModelError
from hybrid_lightning.policy.loading import DTYPES, ModelSource, load_model, load_tokenizer, read_config, resolve_model

PREFIX = "base_model.model."
_FULL = f".modules_to_save.{ADAPTER}."
_LORA = (f".lora_A.{ADAPTER}.", f".lora_B.{ADAPTER}.", f".lora_magnitude_vector.{ADAPTER}.")


def is_trained(name: str) -> bool:
    """Whether a name in a state dict is that of a weight of the adapter, and not of the frozen base."""
    return PREFIX in name and (_FULL in name or any(part in name for part in _LORA))


def peft_weights(state: Mapping[str, Tensor], plan: AdapterPlan, source: str) -> dict[str, Tensor]:
    """Pick the adapter's weights from a state dict and name them as PEFT does in a file.

    Args:
        state: Of the adapted model, or of a module that holds it; whatever else it has is left out.
        plan: By which they were trained.
        source: Where they come from, for the error message.

    Raises:
        CheckpointError: If there are other weights than the plan's, or not in their shapes.
    """
    weights = {_peft_name(name): weight for name, weight in state.items() if is_trained(name)}
    expected = dict(_expected(plan))
    biases = {f"{PREFIX}{name}.bias" for name in plan.full_modules}  # which a module has or not
    different = sorted((expected.keys() ^ weights.keys()) - biases)
    if different:
        verb = "lacks" if different[0] in expected else "has what is not in its plan:"
        raise CheckpointError(f"{source} {verb} the trained weight {different[0]!r}; it is damaged, or not whole")
    for name, shapes in expected.items():
        if tuple(weights[name].shape) not in shapes:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(weights[name].shape)}, where the plan has {shapes[0]}; it is damaged, or not "
                "whole"
            )
    return weights


def _peft_name(name: str) -> str:
    name = name[name.index(PREFIX) :]
    name = name.replace(_FULL, ".").replace(f".lora_magnitude_vector.{ADAPTER}.weight", ".lora_magnitude_vector")
    return name.replace(f".lora_A.{ADAPTER}.", ".lora_A.").replace(f".lora_B.{ADAPTER}.", ".lora_B.")


def _expected(plan: AdapterPlan) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    """Name and possible shapes of every weight that the plan trains, biases aside."""
    for module in plan.candidates:
        name = f"{PREFIX}{module.name}"
        outputs, inputs = module.shape
        if module.mode == "full":
            yield f"{name}.weight", [(outputs, inputs), (inputs, outputs)]  # GPT-2's Conv1D is transposed
        elif module.mode == "lora":
            yield from _expected_lora(name, module, plan)


def _expected_lora(name: str, module: PlannedModule, plan: AdapterPlan) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    outputs, inputs = module.shape
    yield f"{name}.lora_A.weight", [(plan.lora.rank, inputs)]
    yield f"{name}.lora_B.weight", [(outputs, plan.lora.rank)]
    if plan.lora.use_dora:
        yield f"{name}.lora_magnitude_vector", [(outputs,)]


@dataclass(frozen=True)
class BaseModel:
    """The model that was adapted, by the arguments that loaded it. Its weights are read anew for an export, since those in
    memory may be quantized or sharded."""

    model: str  # as `resolve_model` takes it
    revision: str | None = None
    dtype: str = "float32"  # of the weights in training, before any quantization
    chat_template: str | None = None  # in place of the tokenizer's own

    @property
    def source(self) -> ModelSource:
        """Where it is."""
        return resolve_model(self.model, self.revision)

    def load(self) -> PreTrainedModel:
        """Read the weights, on the CPU and in the dtype of training."""
        return load_model(self.source, self.dtype, None)

    def stored_dtype(self) -> str:
        """Dtype of most of the weights in its files, as in `DTYPES`; of a GGUF file, which has none, that of training."""
        source = self.source
        if "gguf_file" in source.arguments:
            return self.dtype
        counts: Counter[str] = Counter()
        for path in _weight_files(source):
            counts.update(_parameters_by_dtype(path))
        dtype = counts.most_common(1)[0][0] if counts else _dtype_of_config(source)
        return dtype if dtype in DTYPES else self.dtype

    def skeleton(self) -> PreTrainedModel:
        """The modules without weights, on the meta device."""
        config = read_config(self.source)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        return model

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with the chat template of training."""
        tokenizer = load_tokenizer(self.source)
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template
        return tokenizer


def _weight_files(source: ModelSource) -> list[str]:
    """The safetensors files of a model, which are on this machine since it has been loaded."""

    def find(name: str) -> str | None:
        try:
            found: str | None = cached_file(source.location, name, local_files_only=True, **source.arguments)
        except OSError:
            return None
        return found

    if (single := find(SAFE_WEIGHTS_NAME)) is not None:
        return [single]
    index = find(SAFE_WEIGHTS_INDEX_NAME)
    names = [] if index is None else sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    return [path for name in names if (path := find(name)) is not None]


def _dtype_of_config(source: ModelSource) -> str:
    try:
        config = read_config(source)
    except ModelError:  # of the hub, which cannot be reached
        return ""
    return str(config.dtype).removeprefix("torch.")


def _parameters_by_dtype(path: str) -> Counter[str]:
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    counts: Counter[str] = Counter()
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (no dict)
            weight = file.get_slice(name)
            counts[names.get(weight.get_dtype(), weight.get_dtype())] += math.prod(weight.get_shape())
    return counts


@dataclass(frozen=True)
class Training:
    """What the model card says of the training."""

    steps: int = 0  # optimizer steps
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of the module, in plain types
    data: Mapping[str, Any] | None = None  # class_path and init_args of the data source
    before: Mapping[str, float] = field(default_factory=dict)  # validation metrics of the start policy
    after: Mapping[str, float] = field(default_factory=dict)  # and of the last validation,
    validated_step: int | None = None  # which was after so many steps


@dataclass(frozen=True)
class TrainedPolicy:
    """A plan, the weights that were trained by it, and the base that they belong to."""

    plan: AdapterPlan
    weights: Mapping[str, Tensor]  # by the names that PEFT gives them in a file, see `peft_weights`; whole, on the CPU
    base: BaseModel
    training: Training = field(default_factory=Training)


def base_of(arguments: Mapping[str, Any]) -> BaseModel:
    """The base model by the arguments of a module such as `PolicyModule`.

    Raises:
        ConfigError: If they do not name a model.
    """
    if not isinstance(arguments.get("model"), str):
        raise ConfigError(
            "cannot export: the module does not say which base model it loaded; it needs a hyper-parameter 'model' (folder"
            " or hub id), as PolicyModule has"
        )
    given: dict[str, Any] = {name: arguments.get(name) for name in ("revision", "dtype", "chat_template")}
    return BaseModel(arguments["model"], **{name: value for name, value in given.items() if value is not None})


def training_of(
    steps: int, arguments: Mapping[str, Any], summary: Mapping[str, Any] | None = None, datamodule: Any = None
) -> Training:
    """Put together what is known of a training.

    Args:
        steps: Optimizer steps taken.
        arguments: Of the module.
        summary: State of a `RunSummary`, which has the validation metrics.
        datamodule: Described by its `source`, if it has one.
    """
    summary = summary or {}
    source: Any = getattr(datamodule, "source", None)
    return Training(
        steps=steps,
        arguments={name: value for name, value in arguments.items() if not name.startswith("_")},
        data=source.to_config() if hasattr(source, "to_config") else None,
        before=summary.get("before", {}),
        after=summary.get("after", {}),
        validated_step=summary.get("validated_step"),
    )


class ExportForm(Configurable, ABC):
    """Writes a policy into a folder.

    A form of one's own implements `write` and `how_to_load`.
    """

    name: str  # of the folder in a run folder
    library: str  # `library_name` and
    relation: str  # `base_model_relation` of the model card

    def check(self, plan: AdapterPlan) -> None:
        """Make sure that the form can hold what a plan trains; most can. Called before training where the plan is known.

        Raises:
            ConfigError: If it cannot.
        """

    def weights_dtype(self, policy: TrainedPolicy) -> str | None:
        """Dtype of the weights that it writes, for the screen and the model card; None says nothing of it."""
        return None

    @abstractmethod
    def write(self, policy: TrainedPolicy, folder: Path) -> None:
        """Write weights, configs and tokenizer; the model card and the plan are written by the caller.

        Args:
            policy: To write.
            folder: Empty.
        """

    @abstractmethod
    def how_to_load(self, policy: TrainedPolicy) -> str:
        """Python code for the model card that loads the policy, run with this folder as the working directory."""
