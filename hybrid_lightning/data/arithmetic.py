"""Built-in procedural tasks: sums and products of two numbers (the task of the embedded default: a number and a digit).

Which split a problem belongs to is fixed by a hash of its two operands.
"""

import hashlib
import random
from abc import abstractmethod
from collections.abc import Iterable
from itertools import product
from typing import Any, ClassVar

from hybrid_lightning.data.source import PromptSource
from hybrid_lightning.data.splitting import Row, Splits
from hybrid_lightning.errors import ConfigError

FACTORS = range(2, 10)  # the digits that `ProductSource` multiplies by, by default
_HASH_BUCKETS = 10  # one is validation and one is test
_MAX_NUMBERS = 2_000  # all pairs are enumerated: 4 million take some seconds
_MAX_PRODUCTS = 8_000_000  # all of them are enumerated, which takes some seconds


class OperandSource(PromptSource):
    """Base of the arithmetic tasks, problems `a OP b=`; a hash of the operands fixes their split, whatever the seed.

    A model that was pretrained on training problems has therefore never seen a problem of validation or test, under any seed.

    Args:
        low: Smallest number.
        high: Largest number.
        train_size: Number of training problems; None for all.
        validation_size: Number of validation problems.
        test_size: Number of test problems.
        seed: Seed for drawing problems and their order.
    """

    sign: ClassVar[str]  # OP

    def __init__(
        self,
        low: int,
        high: int,
        train_size: int | None = None,
        validation_size: int = 200,
        test_size: int = 400,
        seed: int = 0,
    ) -> None:
        if not 0 <= low <= high:
            raise ConfigError(f"data.source: low={low} and high={high} are not a range; give 0 <= low <= high")
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
    def row(self, a: int, b: int) -> Row:
        """The row for the problem with these two operands."""

    def split_of(self, a: int, b: int) -> str:
        """The split for the problem with these two operands."""
        return hashed_split(f"{a}{self.sign}{b}")

    def _row(self, a: int, b: int, answer: int, index: int, **columns: str) -> Row:
        """Row with the columns `a`, `b`, `question`, `answer` and more."""
        question = f"{a}{self.sign}{b}="
        shown = {"a": a, "b": b, "question": question, "answer": str(answer), **columns}
        return Row(question, str(answer), index, type(self).__name__, shown)

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


class ArithmeticSource(OperandSource):
    """Sums such as `37+85=`.

    A hash of the operands, regardless of their order, fixes the split of a sum, whatever the seed: if 37+85 is a training
    problem, 85+37 is never in validation or test.

    Each row has the columns `a`, `b`, `question` (`"37+85="`) and `answer` (`"122"`).

    Args:
        low: Smallest operand.
        high: Largest operand.
        **drawn: Arguments of `OperandSource`: sizes of the splits, and a seed.

    Raises:
        ConfigError: If there are fewer problems than requested.

    Example:
        >>> splits = ArithmeticSource(validation_size=5, test_size=5).load()
        >>> splits.validation[0].question, splits.validation[0].answer
        ('84+95=', '179')
    """

    sign = "+"

    def __init__(self, low: int = 10, high: int = 99, **drawn: Any) -> None:
        super().__init__(low, high, **drawn)
        if high - low >= _MAX_NUMBERS:
            raise ConfigError(
                f"data.source: low={low} to high={high} is too wide, since all pairs are enumerated; give fewer than "
                f"{_MAX_NUMBERS} numbers"
            )

    def operands(self) -> Iterable[tuple[int, int]]:
        """All ordered pairs of numbers."""
        numbers = range(self.low, self.high + 1)
        return product(numbers, numbers)

    def split_of(self, a: int, b: int) -> str:
        """Split of a sum, the same for both orders of the operands."""
        return super().split_of(min(a, b), max(a, b))

    def row(self, a: int, b: int) -> Row:
        """Row of the sum of two numbers."""
        return self._row(a, b, a + b, index=a * (self.high + 1) + b)


class ProductSource(OperandSource):
    """Products such as `347*6=`, of a number and, by default, a digit from 2 to 9.

    A hash of the operands fixes the split of a product, whatever the seed: problems that the embedded policy was pretrained on
    are never in validation or test.

    Each row has the columns `a`, `b`, `question` (`"347*6="`), `answer` (`"2082"`) and `worked` (`"[42 28 20]2082"`).

    Args:
        low: Smallest number.
        high: Largest number; the embedded policy knows numbers of two and three digits.
        low_factor: Smallest number to multiply by.
        high_factor: Largest number to multiply by.
        **drawn: Arguments of `OperandSource`: sizes of the splits, and a seed.

    Raises:
        ConfigError: If there are fewer problems than requested.

    Example:
        >>> splits = ProductSource(validation_size=5, test_size=5).load()
        >>> splits.validation[0].question, splits.validation[0].answer
        ('833*4=', '3332')
    """

    sign = "*"

    def __init__(
        self,
        low: int = 10,
        high: int = 999,
        low_factor: int = FACTORS[0],
        high_factor: int = FACTORS[-1],
        **drawn: Any,
    ) -> None:
        super().__init__(low, high, **drawn)
        if not 0 <= low_factor <= high_factor:
            raise ConfigError(
                f"data.source: low_factor={low_factor} and high_factor={high_factor} are not a range; give 0 <= low_factor <= "
                "high_factor"
            )
        self.factors = range(low_factor, high_factor + 1)
        if (products := (high - low + 1) * len(self.factors)) > _MAX_PRODUCTS:
            raise ConfigError(
                f"data.source: low={low} to high={high} and its factors make {products} products, which are all enumerated; give "
                f"narrower ranges, with at most {_MAX_PRODUCTS} products"
            )

    def operands(self) -> Iterable[tuple[int, int]]:
        """Every number with every factor."""
        return product(range(self.low, self.high + 1), self.factors)

    def row(self, a: int, b: int) -> Row:
        """Row of the product of two numbers, with the column `worked` too."""
        index = a * 10 ** len(str(self.factors[-1])) + b
        return self._row(a, b, a * b, index, worked=worked_answer(a, b))


def hashed_split(problem: str) -> str:
    """Split that a problem belongs to by its hash: `train`, `validation` or `test`."""
    digest = hashlib.sha256(problem.encode()).digest()
    bucket = int.from_bytes(digest[:8], "big") % _HASH_BUCKETS
    return {0: "validation", 1: "test"}.get(bucket, "train")


def worked_answer(a: int, b: int) -> str:
    """Worked answer of a product: partial products in brackets, units first and with the carry added, then the product.

    Example:
        >>> worked_answer(347, 6)
        '[42 28 20]2082'
    """
    partial_products = []
    carry = 0
    for digit in reversed(str(a)):
        partial = int(digit) * b + carry
        partial_products.append(f"{partial:02d}")
        carry = partial // 10
    return f"[{' '.join(partial_products)}]{a * b}"
