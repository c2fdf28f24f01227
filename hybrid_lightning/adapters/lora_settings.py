"""Settings of the low-rank part of the adapter, and the modules and names that PEFT treats differently from others."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hybrid_lightning.adapters.candidates import without_lora
from hybrid_lightning.errors import ConfigError, PlanError

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

    from hybrid_lightning.adapters.candidates import Shape

ADAPTER = "default"  # PEFT's name for the only adapter


@dataclass(frozen=True)
class LoraSettings:
    """How LoRA adapts a module with weight W [m, n]: W + (alpha / rank) B A, with B [m, rank] and A [rank, n].

    Args:
        rank: Rank r of the update B A.
        alpha: Numerator of the update's scale.
        dropout: Probability of dropout on the input of A, while training.
        use_dora: Also learn the norm of each row of the adapted weight (DoRA, arXiv 2402.09353).
        use_rslora: Scale by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732).
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    use_dora: bool = False
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank={self.rank} must be at least 1; for no LoRA at all set a budget share of 1")
        if not self.alpha > 0:
            raise ConfigError(f"alpha={self.alpha}; give a positive number, such as twice the rank")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout}; give a probability of at least 0 and below 1")

    @property
    def scale(self) -> float:
        """Factor of B A in the adapted weight."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def variant(self) -> str:
        """Name of this variant: LoRA, DoRA or rsLoRA."""
        return "DoRA" if self.use_dora else "rsLoRA" if self.use_rslora else "LoRA"

    def check_experts(self) -> None:
        """Raise ConfigError unless these settings work for experts: PEFT adapts their weights before it multiplies by them."""
        if self.use_dora or self.dropout:
            given = "use_dora=true" if self.use_dora else f"dropout={self.dropout}"
            raise ConfigError(
                f"adapter.{given} does not work with LoRA on experts, where PEFT supports only plain LoRA and rsLoRA without "
                "dropout; leave it out, or give experts rank 0: --adapter.rank_pattern='{experts: 0}'"
            )

    def with_rank(self, rank: int) -> "LoraSettings":
        """The same settings at another rank.

        Plain LoRA keeps alpha / rank, rsLoRA keeps alpha. At the same learning rate, steps grow with the rank or with its root.
        """
        return replace(self, rank=rank, alpha=self.alpha if self.use_rslora else self.alpha * rank / self.rank)

    def parameters(self, shape: "Shape") -> int:
        """Number of trainable parameters that LoRA adds to a module; each expert has the whole rank."""
        if isinstance(shape, Mapping):
            return sum(self.rank * math.prod(experts) * (rows + columns) for *experts, rows, columns in shape.values())
        outputs, inputs = shape
        return self.rank * (outputs + inputs) + (outputs if self.use_dora else 0)


def check_lora_modules(names: Iterable[str]) -> None:
    """Raise PlanError if a module with LoRA cannot have it, as in a plan that was edited."""
    refused = without_lora(names)
    if refused:
        raise PlanError(
            f"{refused[0]} cannot have LoRA, since kernels of state space layers read its weight directly; give it the mode "
            '"frozen" or "full" in the plan'
        )


def target_exactly(config: "LoraConfig", model: "nn.Module") -> None:
    """Change a config in place so that PEFT finds all of its LoRA modules in a model with experts.

    PEFT takes some names, such as `down_proj`, for the names that experts had before transformers 5, even in a dense layer or
    in shared experts. It leaves the name of a weight alone. So such modules get LoRA on the weight, which computes the same,
    without dropout.

    Raises:
        ConfigError: If such modules have DoRA, which PEFT cannot put on a weight by name.
    """
    taken = _taken_for_experts(model, config.target_modules or ())
    if not taken:
        return
    if config.use_dora:
        raise ConfigError(
            f"PEFT cannot load DoRA on {len(taken)} modules of {type(model).__name__}, such as {taken[0]}; export "
            "form=MergedModel"
        )
    config.target_modules = sorted({*(config.target_modules or ())} - {*taken})
    config.target_parameters = [*(config.target_parameters or ()), *(f"{name}.weight" for name in taken)]
    config.lora_dropout = 0.0
    ends = {f"^{re.escape(name)}": r"\.weight" for name in taken}
    config.rank_pattern = {f"{key}{ends.get(key, '')}": rank for key, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {f"{key}{ends.get(key, '')}": alpha for key, alpha in (config.alpha_pattern or {}).items()}


@contextmanager
def exact_names(model: "nn.Module") -> Iterator[None]:
    """Make PEFT leave module names alone within this context (see `target_exactly`): it renames them by the kind of model."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind is None:
        yield
        return
    own = "model_type" in vars(config)  # most configs have it as an attribute of their class
    config.model_type = ""  # type: ignore[union-attr]
    try:
        yield
    finally:
        if own:
            config.model_type = kind  # type: ignore[union-attr]
        else:
            del config.model_type  # type: ignore[union-attr]


def _taken_for_experts(model: "nn.Module", names: Iterable[str]) -> list[str]:
    from peft import LoraConfig  # slow to import
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    def is_taken(kind: str) -> bool:
        config = LoraConfig(target_modules=[kind])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # a name that PEFT accepts only together with others
            return True
        return config.target_modules != {kind}

    kinds = {name.rpartition(".")[2] for name in names}
    return sorted(name for name in names if name.rpartition(".")[2] in {kind for kind in kinds if is_taken(kind)})
