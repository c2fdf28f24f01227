"""The low-rank part of the adapter: its settings, and the `LoraConfig` by which PEFT makes it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybrid_lightning.errors import ConfigError, PlanError

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER = "default"  # PEFT's name for the only adapter


@dataclass(frozen=True)
class LoraSettings:
    """How modules that are not fully trained are adapted: W + (alpha / rank) B A, B [m, rank], A [rank, n].

    Args:
        rank: r of the update.
        alpha: numerator of the update's scale.
        dropout: on the input of A, while training.
        use_dora: also learn the length of each output's weights (DoRA, arXiv 2402.09353).
        use_rslora: scale by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732).
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    use_dora: bool = False
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank={self.rank}: LoRA needs a rank of at least 1; for no LoRA at all take a budget share of 1.")
        if not self.alpha > 0:
            raise ConfigError(f"alpha={self.alpha}: must be positive, such as twice the rank.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout}: must be at least 0 and below 1.")

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def parameters(self, shape: tuple[int, int]) -> int:
        """Trainable parameters that LoRA adds to a module.

        Args:
            shape: (outputs, inputs) of the module.
        """
        outputs, inputs = shape
        return self.rank * (outputs + inputs) + (outputs if self.use_dora else 0)


def lora_config(modes: Mapping[str, str], lora: LoraSettings, fan_in_fan_out: bool = False) -> "LoraConfig":
    """Build the config that makes `get_peft_model` adapt modules as planned.

    Args:
        modes: Full module name -> `full`, `lora` or `frozen`.
        lora: Settings of the low-rank part.
        fan_in_fan_out: LoRA modules store their weights as [inputs, outputs], as GPT-2's do.

    Raises:
        PlanError: If nothing is trained, or a name ends like that of a module with another mode.
    """
    from peft import LoraConfig  # slow to import, and not needed for a plan
    from peft.utils.constants import DUMMY_TARGET_MODULES

    low_rank = [name for name, mode in modes.items() if mode == "lora"]
    full = [name for name, mode in modes.items() if mode == "full"]
    if not low_rank and not full:
        raise PlanError('the plan leaves all modules frozen: give at least one the mode "full" or "lora".')
    _check_ends(modes)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT only divides by the rank
        lora_dropout=lora.dropout,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        fan_in_fan_out=fan_in_fan_out,
        # with None PEFT would fill in the architecture's usual modules, and with [] it refuses to go on
        target_modules=low_rank or DUMMY_TARGET_MODULES,
        modules_to_save=full or None,
    )


def _check_ends(modes: Mapping[str, str]) -> None:
    """PEFT also trains fully what ends like the name of a fully trained module, and gives LoRA to what ends, at a dot, like that
    of a LoRA module."""
    full = tuple(name for name, mode in modes.items() if mode == "full")
    low_rank = tuple(f".{name}" for name, mode in modes.items() if mode == "lora")
    for name, mode in modes.items():
        if (mode != "full" and name.endswith(full)) or (mode == "frozen" and name.endswith(low_rank)):
            raise PlanError(
                f'PEFT would not leave {name} "{mode}", since its name ends like that of a module with another mode: give them '
                "the same mode in the plan."
            )
