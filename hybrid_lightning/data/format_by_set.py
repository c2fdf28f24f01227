"""Each set of a mixture with a format of its own."""

from hybrid_lightning.data.formatting import PromptFormat
from hybrid_lightning.data.splitting import Row
from hybrid_lightning.errors import ConfigError, DataError
from hybrid_lightning.types import Prompt


class FormatBySet(PromptFormat):
    r"""Asks the problems of each set in their own way: mathematics with the answer in `\boxed{}`, code in a block of Python.

    Args:
        formats: Name of the set (as in the data source `Mixture`) -> its format.

    Raises:
        ConfigError: If there is no set.
    """

    def __init__(self, formats: dict[str, PromptFormat]) -> None:
        super().__init__()
        if not formats:
            raise ConfigError("FormatBySet: formats={}: give each set a format, as in formats: {gsm8k: ChatFormat}")
        self.formats = formats

    def format(self, row: Row) -> Prompt:
        """Make the prompt of a row as its set does.

        Raises:
            DataError: If the set has no format.
        """
        if row.set_name not in self.formats:
            raise DataError(
                f"FormatBySet: {row.source}, row {row.index} is of set {row.set_name!r}, which has no format; there is one for "
                f"{', '.join(self.formats)}: name the sets as the data source does"
            )
        return self.formats[row.set_name].format(row)
