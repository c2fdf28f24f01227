"""`AdapterPlan`: how each module is trained, and where that decision came from.

A plan is saved as `plan.json` in the run folder and inside every checkpoint. To change it by hand, edit the `mode` of a module
and delete the line with the digest (or make it null): a file that has a digest must be exactly as it was written.

`model_digest` is a cheap fingerprint of a model's weights. A plan or a checkpoint recognises its base model by it.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hybrid_lightning.adapters.candidates import Shape, candidate_shape
from hybrid_lightning.adapters.lora_settings import LoraSettings, target_exactly
from hybrid_lightning.errors import ConfigError, ModelError, PlanError

if TYPE_CHECKING:
    from peft import LoraConfig

Mode = Literal["full", "lora", "frozen"]
SAMPLES_PER_PARAMETER = 1024  # values that are hashed
FORMAT = 1  # version of the fields; a plan with another version is refused
_NEW_PLAN = "make a new plan for this model with the score command"


@dataclass(frozen=True)
class PlannedModel:
    """Names the model that a plan is for."""

    model: str  # id or path
    digest: str  # `model_digest` of its weights
    revision: str | None = None  # of a hub model; None: none was given


@dataclass(frozen=True)
class PlannedModule:
    """One candidate module and how it is trained."""

    name: str  # full dotted name in the base model
    shape: Shape  # (outputs, inputs); for experts and routers, name of each parameter with matrices -> its shape
    parameters: int  # entries of weights and biases: full training includes biases, LoRA leaves them alone
    score: float | None  # higher is more sensitive to low-rank adaptation; None: not scored
    mode: Mode  # fully trained, adapted with LoRA, or frozen
    rank: int | None = None  # LoRA rank; None: the rank of the plan's `lora`

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise PlanError(f'{self.name} has the mode "{self.mode}"; it must be one of {", ".join(get_args(Mode))}')
        if self.rank is not None and self.rank < 1:
            raise PlanError(f'{self.name} has the rank {self.rank}; it must be at least 1; for no LoRA make the mode "frozen"')

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the parameters of experts or of a router; empty for a linear module."""
        return tuple(self.shape) if isinstance(self.shape, Mapping) else ()

    def lora_layers(self) -> dict[str, str]:
        """Name of each weight that LoRA adapts -> name of PEFT's layer; the first parameter of experts is innermost."""
        inner = ".base_layer"
        return {
            part: self.name + inner * (len(self.experts) - 1 - place) for place, part in enumerate(self.experts or ["weight"])
        }

    def lora(self, settings: LoraSettings) -> LoraSettings:
        """A plan's LoRA settings at the rank of this module."""
        return settings if self.rank is None else settings.with_rank(self.rank)


@dataclass(frozen=True)
class AdapterPlan:
    """The decision made from the scores: everything needed to build the adapter again."""

    model: str  # id or path of the base model
    revision: str | None  # revision of a hub model; None: none was given
    model_digest: str  # `model_digest` of the base model
    candidates: tuple[PlannedModule, ...]  # in the model's order
    lora: LoraSettings
    budget: dict[str, Any]  # class_path and init_args of the `Budget`
    scorer: dict[str, Any] | None = None  # class_path and init_args of the `Scorer`; None: not scored
    calibration: dict[str, Any] = field(default_factory=dict)  # how the scores were calibrated, in plain values
    seed: int | None = None  # seed of the calibration

    def __post_init__(self) -> None:
        names = [module.name for module in self.candidates]
        double = next((name for name, count in Counter(names).items() if count > 1), None)
        if double is not None:
            raise PlanError(f"the plan names {double} twice; remove one of the two entries")
        if not names:
            raise PlanError("the plan has no modules; make a new one with the score command")
        if self.has_experts:
            self.lora.check_experts()

    @property
    def has_experts(self) -> bool:
        """Whether experts or routers have LoRA."""
        return any(module.experts and module.mode == "lora" for module in self.candidates)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the plan's whole content."""
        return _digest(self._content())

    @property
    def is_scored(self) -> bool:
        """Whether any module has a score."""
        return any(module.score is not None for module in self.candidates)

    @property
    def full_modules(self) -> tuple[str, ...]:
        """Names of the fully trained modules."""
        return tuple(module.name for module in self.candidates if module.mode == "full")

    @property
    def lora_modules(self) -> tuple[str, ...]:
        """Names of the modules with LoRA."""
        return tuple(module.name for module in self.candidates if module.mode == "lora")

    @property
    def method(self) -> str:
        """Kind of training: `full`, `LoRA` (or its variant), or `Hybrid-LoRA` if there are modules of both kinds."""
        if not self.lora_modules:
            return "full"
        return f"Hybrid-{self.lora.variant}" if self.full_modules else self.lora.variant

    def lora_of(self, module: PlannedModule) -> LoraSettings:
        """LoRA settings of a module, at its own rank."""
        return module.lora(self.lora)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The different ranks of the LoRA modules, in ascending order."""
        return tuple(sorted({self.lora_of(module).rank for module in self.candidates if module.mode == "lora"}))

    def trainable_parameters(self) -> int:
        """Number of parameters that the adapter trains."""
        full = sum(module.parameters for module in self.candidates if module.mode == "full")
        return full + sum(self.lora_of(m).parameters(m.shape) for m in self.candidates if m.mode == "lora")

    def to_peft_config(self, model: nn.Module | None = None) -> "LoraConfig":
        """The plan as a PEFT config, for code of your own that takes one, such as `get_peft_model` or TRL's trainers.

        Use it with a base model in float32: PEFT keeps the copies of fully trained modules in the dtype of the base, and in 16
        bits small optimizer steps vanish (`apply_plan` makes float32 copies).

        Args:
            model: The base model, which may be on the meta device. Only GPT-2 and models with experts need it.

        Returns:
            A new `LoraConfig` with the LoRA modules as `target_modules` (experts as `target_parameters`) and the fully trained
            ones as `modules_to_save`, by their full names.

        Raises:
            PlanError: If nothing is trained, or PEFT, which matches names by suffix, would mistake one module for another.
        """
        config = self.lora_config(model)
        if model is not None:
            target_exactly(config, model)
        return config

    def lora_config(self, model: nn.Module | None) -> "LoraConfig":
        """Like `to_peft_config`, with names as they are."""
        from peft import LoraConfig  # slow to import, and not needed for a plan
        from peft.utils.constants import DUMMY_TARGET_MODULES

        if not self.lora_modules and not self.full_modules:
            raise PlanError('the plan leaves all modules frozen; give at least one the mode "full" or "lora"')
        self._check_suffixes()
        adapted = [module for module in self.candidates if module.mode == "lora"]
        parameters = {module.name: [f"{module.name}.{part}" for part in module.experts] for module in adapted}
        own = {part: self.lora_of(m) for m in adapted if m.rank is not None for part in parameters[m.name] or [m.name]}
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.lora.rank,
            lora_alpha=self.lora.alpha,  # type: ignore[arg-type]  # PEFT only divides by the rank
            # PEFT reads the keys as regular expressions, and uses the first one that matches the end of a name.
            rank_pattern={f"^{re.escape(name)}": settings.rank for name, settings in own.items()},
            alpha_pattern={f"^{re.escape(name)}": settings.alpha for name, settings in own.items()},
            lora_dropout=self.lora.dropout,
            use_dora=self.lora.use_dora,
            use_rslora=self.lora.use_rslora,
            # Whether the weights are stored as [inputs, outputs], as in GPT-2.
            fan_in_fan_out=model is not None and any(isinstance(model.get_submodule(name), Conv1D) for name in parameters),
            # None would give PEFT's defaults for the architecture, and PEFT refuses [].
            target_modules=[name for name, parts in parameters.items() if not parts] or DUMMY_TARGET_MODULES,
            target_parameters=[part for parts in parameters.values() for part in parts] or None,
            modules_to_save=list(self.full_modules) or None,
        )

    def _check_suffixes(self) -> None:
        """Refuse names that would make PEFT give a module the wrong mode, since PEFT matches names by suffix.

        PEFT also trains a module fully if its name ends with the name of a fully trained module. It also gives LoRA to a module
        if its name ends, at a dot, with the name of a LoRA module.
        """
        lora_modules = tuple(f".{name}" for name in self.lora_modules)
        for module in self.candidates:
            name, mode = module.name, module.mode
            if (mode != "full" and name.endswith(self.full_modules)) or (mode == "frozen" and name.endswith(lora_modules)):
                raise PlanError(
                    f'PEFT would not keep {name} "{mode}", since a module with another mode has a name with the same ending; '
                    "give both the same mode in the plan"
                )

    def check_model(self, model: nn.Module) -> None:
        """Check that the plan fits a base model: every planned module is there, with its shape.

        Raises:
            PlanError: If not; the message names the first difference.
        """
        modules = dict(model.named_modules())
        for planned in self.candidates:
            module = modules.get(planned.name)
            shape = None if module is None else candidate_shape(module)
            if not shape:
                found = "no such module" if module is None else f"a {type(module).__name__} there, not a linear module"
                raise PlanError(
                    f"the plan was made for {self.model} and names {planned.name}; this model has {found}; {_NEW_PLAN}"
                )
            if shape != planned.shape:
                raise PlanError(
                    f"the plan was made for {self.model}, where {planned.name} has shape {planned.shape}; here it has "
                    f"{shape}; {_NEW_PLAN}"
                )

    def check_weights(self, model: nn.Module) -> None:
        """Check that a base model, neither quantized nor sharded yet, has the weights that the plan was made for.

        Raises:
            PlanError: If its digest differs.
        """
        if model_digest(model) != self.model_digest:
            raise PlanError(
                f"the plan was made for {self.model} with other weights or another dtype than this model; {_NEW_PLAN}"
            )

    def _content(self) -> dict[str, Any]:
        content = plain({"format": FORMAT, **asdict(self)})
        for module in content["candidates"]:
            if module["rank"] is None:
                del module["rank"]
        # The long list comes last, so that a reader of the file sees the rest first.
        return {**content, "candidates": content.pop("candidates")}

    def to_dict(self) -> dict[str, Any]:
        """The plan in plain types, including its digest, for JSON and for checkpoints."""
        return {"digest": self.digest, **self._content()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "the adapter plan") -> "AdapterPlan":
        """Build a plan from what `to_dict` returned; error messages name `source` as its origin.

        Raises:
            PlanError: If fields are missing or unknown, a value is impossible, or the digest does not fit.
        """
        try:
            content = dict(data)
            digest, version = content.pop("digest", None), content.pop("format")
            if version != FORMAT:
                raise PlanError(f"it has format {version}, and this version reads {FORMAT}")
            modules = [PlannedModule(**{**module, "shape": _shape(module["shape"])}) for module in content["candidates"]]
            plan = cls(**{**content, "lora": LoraSettings(**content["lora"]), "candidates": tuple(modules)})
            changed = digest not in (None, plan.digest)
        except (ConfigError, PlanError, KeyError, TypeError, ValueError) as error:
            cause = f"the field {error} is missing" if isinstance(error, KeyError) else error
            raise PlanError(f"{source} is not an adapter plan: {cause}; correct it, or make a new one with `score`") from error
        if changed:
            raise PlanError(
                f"{source} was changed after it was written (its digest does not match); if that was on purpose, delete its "
                'line "digest"'
            )
        return plan

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, one module per line."""
        Path(path).write_text(_dumps(self.to_dict()), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "AdapterPlan":
        """Read a plan that `save` wrote and that may have been edited since.

        Raises:
            PlanError: If the file is missing or does not hold a plan.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"the plan {path} cannot be read ({error.strerror}); give the path of a plan.json") from error
        except ValueError as error:
            raise PlanError(f"the plan {path} is not JSON ({error}); correct it, or make a new one") from error
        return cls.from_dict(data, source=str(path))


def model_digest(model: nn.Module) -> str:
    """Fingerprint a base model with real weights, not adapted, quantized or sharded yet: SHA-256 in hexadecimal digits.

    It hashes the name, shape and dtype of every parameter and at most 1024 of its values at a fixed stride, so that it takes
    seconds for a model of any size and does not depend on the device.

    Raises:
        ModelError: If weights are on the meta device.
    """
    sha = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.is_meta:
            raise ModelError(f"parameter {name} has no values yet (meta device); load the weights before the digest")
        sha.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        flat = parameter.detach().reshape(-1)
        # The stride is odd: an even one would take the same few columns of every row of a matrix.
        stride = math.ceil(flat.numel() / SAMPLES_PER_PARAMETER) | 1
        sha.update(flat[::stride].contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


# ---- JSON, in a layout that a person can read and edit


def plain(value: Any) -> Any:
    """Reduce a value to JSON's types, as it would be read back from a file; PlanError if a number is not finite."""
    try:
        return json.loads(json.dumps(value, allow_nan=False, default=str))
    except ValueError as error:
        raise PlanError(f"a plan cannot hold infinite numbers or nan ({error}); look for them in its scores") from error


def _shape(value: Any) -> Shape:
    return {name: tuple(sizes) for name, sizes in value.items()} if isinstance(value, Mapping) else tuple(value)  # type: ignore[return-value]


def _digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of a plan in plain types, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _dumps(content: Mapping[str, Any]) -> str:
    """Write a plan as JSON with one line for each field and for each entry of a list."""
    lines = []
    for name, value in content.items():
        if isinstance(value, list):
            entries = ",\n".join(f"    {json.dumps(entry)}" for entry in value)
            lines.append(f"  {json.dumps(name)}: [\n{entries}\n  ]")
        else:
            lines.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
