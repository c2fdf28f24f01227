"""Settings of the low-rank part of the adapter."""

import math
from dataclasses import dataclass

from hybrid_lightning.errors import ConfigError

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
