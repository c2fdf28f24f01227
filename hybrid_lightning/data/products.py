"""Products of a number and a digit: the task of the embedded default."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import product

from hybrid_lightning.data.operands import OperandSource, arithmetic_row, hashed_split
from hybrid_lightning.data.splitting import Row
from hybrid_lightning.errors import ConfigError

FACTORS = range(2, 10)
_LARGEST = 999_999  # all products are enumerated: 8 million take some seconds


class ProductSource(OperandSource):
    """Products such as `347*6=`, of a number and a digit from 2 to 9.

    Which split a product belongs to is fixed by a hash of its operands, whatever the seed: what the embedded policy was
    pretrained on is never in validation or test.

    Each row has the columns `a`, `b`, `question` (`"347*6="`), `answer` (`"2082"`) and `worked` (`"[42 28 20]2082"`).

    Args:
        low: Smallest number.
        high: Largest number; the embedded policy knows numbers of two and three digits.
        train_size: Training problems; None takes all there are.
        validation_size: Validation problems.
        test_size: Test problems.
        seed: Of the draw of problems and of their order.

    Raises:
        ConfigError: If there are not that many problems.

    Example:
        >>> splits = ProductSource(validation_size=5, test_size=5).load()
        >>> splits.validation[0].question, splits.validation[0].answer
        ('833*4=', '3332')
    """

    def __init__(
        self,
        low: int = 10,
        high: int = 999,
        train_size: int | None = None,
        validation_size: int = 200,
        test_size: int = 400,
        seed: int = 0,
    ) -> None:
        super().__init__(low, high, train_size, validation_size, test_size, seed)
        if high > _LARGEST:
            raise ConfigError(
                f"data.source: high={high} is too large, since all products are enumerated; take at most {_LARGEST}"
            )

    def operands(self) -> Iterable[tuple[int, int]]:
        """Every number with every digit from 2 to 9."""
        return product(range(self.low, self.high + 1), FACTORS)

    def split_of(self, a: int, b: int) -> str:
        """The split of a product."""
        return product_split(a, b)

    def row(self, a: int, b: int) -> Row:
        """The product of a number and a digit."""
        row = arithmetic_row(a, "*", b, a * b, index=a * 10 + b, source=type(self).__name__)
        return replace(row, columns={**row.columns, "worked": worked_answer(a, b)})


def product_split(a: int, b: int) -> str:
    """The split that a product belongs to: `train`, `validation` or `test`."""
    return hashed_split(f"{a}*{b}")


def worked_answer(a: int, b: int) -> str:
    """The partial products in brackets, units first and with the carry added, and the product behind them.

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
