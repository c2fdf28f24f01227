"""What the built-in arithmetic tasks share: problems of two operands, whose split is fixed by the operands."""

import hashlib
import random
from abc import abstractmethod
from collections.abc import Iterable

from hybrid_lightning.data.source import PromptSource
from hybrid_lightning.data.splitting import Row, Splits
from hybrid_lightning.errors import ConfigError

_BUCKETS = 10  # one tenth of all problems for validation, one for the test


class OperandSource(PromptSource):
    """Problems `a OP b=`, each in the split that a hash of its operands says, whatever the seed.

    What was pretrained on training problems has therefore never seen a problem of validation or test, under any seed.

    Args:
        low: Smallest first operand.
        high: Largest first operand.
        train_size: Training problems; None takes all there are.
        validation_size: Validation problems.
        test_size: Test problems.
        seed: Of the draw of problems and of their order.

    Raises:
        ConfigError: If a size or the range is impossible.
    """

    def __init__(self, low: int, high: int, train_size: int | None, validation_size: int, test_size: int, seed: int) -> None:
        if not 0 <= low <= high:
            raise ConfigError(f"data.source: low={low} and high={high} must satisfy 0 <= low <= high")
        sizes = {"train": train_size, "validation": validation_size, "test": test_size}
        for split, size in sizes.items():
            smallest = 1 if split == "train" else 0
            if size is not None and size < smallest:
                raise ConfigError(f"data.source: {split}_size={size} is too small; give at least {smallest}")
        self.low, self.high, self.seed = low, high, seed
        self._sizes = sizes

    @abstractmethod
    def operands(self) -> Iterable[tuple[int, int]]:
        """All pairs of operands."""

    @abstractmethod
    def split_of(self, a: int, b: int) -> str:
        """The split that a problem belongs to."""

    @abstractmethod
    def row(self, a: int, b: int) -> Row:
        """The problem of two operands."""

    def read(self) -> Splits:
        """Draw the problems of each split."""
        pools: dict[str, list[tuple[int, int]]] = {split: [] for split in self._sizes}
        for a, b in self.operands():
            pools[self.split_of(a, b)].append((a, b))
        return Splits(**{split: self._draw(split, pairs) for split, pairs in pools.items()})

    def _draw(self, split: str, pairs: list[tuple[int, int]]) -> list[Row]:
        size = self._sizes[split]
        if size is not None and size > len(pairs):
            raise ConfigError(
                f"data.source: {split}_size={size}, but operands from low={self.low} to high={self.high} give "
                f"{len(pairs)} {split} problems; lower it or widen the range"
            )
        drawn = random.Random(f"{self.seed} {split}").sample(pairs, len(pairs) if size is None else size)
        return [self.row(a, b) for a, b in drawn]


def hashed_split(problem: str) -> str:
    """The split that a problem belongs to: `train`, `validation` or `test`.

    Example:
        >>> hashed_split("347*6") == hashed_split("347*6")
        True
    """
    digest = hashlib.sha256(problem.encode()).digest()
    bucket = int.from_bytes(digest[:8], "big") % _BUCKETS
    return {0: "validation", 1: "test"}.get(bucket, "train")


def arithmetic_row(a: int, operator: str, b: int, answer: int, index: int, source: str) -> Row:
    """A row with the columns `a`, `b`, `question` and `answer`."""
    question = f"{a}{operator}{b}="
    return Row(question, str(answer), index, source, {"a": a, "b": b, "question": question, "answer": str(answer)})
