"""Sums of two numbers, a built-in procedural task with answers of several tokens."""

from collections.abc import Iterable
from itertools import product

from hybrid_lightning.data.operands import OperandSource, arithmetic_row, hashed_split
from hybrid_lightning.data.splitting import Row
from hybrid_lightning.errors import ConfigError

_WIDEST = 2_000  # all pairs are enumerated: 4 million take some seconds


class ArithmeticSource(OperandSource):
    """Sums such as `37+85=`.

    Which split a sum belongs to is fixed by a hash of its unordered pair of operands, whatever the seed: 85+37 is never held out
    while 37+85 is trained on.

    Each row has the columns `a`, `b`, `question` (`"37+85="`) and `answer` (`"122"`).

    Args:
        low: Smallest operand.
        high: Largest operand.
        train_size: Training problems; None takes all there are.
        validation_size: Validation problems.
        test_size: Test problems.
        seed: Of the draw of problems and of their order.

    Raises:
        ConfigError: If there are not that many problems.

    Example:
        >>> splits = ArithmeticSource(validation_size=5, test_size=5).load()
        >>> splits.validation[0].question, splits.validation[0].answer
        ('84+95=', '179')
    """

    def __init__(
        self,
        low: int = 10,
        high: int = 99,
        train_size: int | None = None,
        validation_size: int = 200,
        test_size: int = 400,
        seed: int = 0,
    ) -> None:
        super().__init__(low, high, train_size, validation_size, test_size, seed)
        if high - low >= _WIDEST:
            raise ConfigError(
                f"data.source: low={low} to high={high} is too wide: all pairs are enumerated; take fewer than {_WIDEST} numbers"
            )

    def operands(self) -> Iterable[tuple[int, int]]:
        """All ordered pairs."""
        numbers = range(self.low, self.high + 1)
        return product(numbers, numbers)

    def split_of(self, a: int, b: int) -> str:
        """The split of a sum, the same for both orders."""
        return hashed_split(f"{min(a, b)}+{max(a, b)}")

    def row(self, a: int, b: int) -> Row:
        """The sum of two numbers."""
        return arithmetic_row(a, "+", b, a + b, index=a * (self.high + 1) + b, source=type(self).__name__)
