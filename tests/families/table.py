"""`docs/reference/models.md` as tests read it."""

from pathlib import Path

from columns import COLUMNS, ROWS

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "models.md"


def assert_column(name: str) -> None:
    """Each column's result equals the page's; `python docs/generate.py --models` writes a change."""
    lines = [line.strip("| \n").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    header = lines[0]
    said = {cells[0].strip("`"): cells[header.index(name)] for cells in lines[1:] if len(cells) == len(header)}
    assert list(said) == ROWS and header[1:] == list(COLUMNS), "run python docs/generate.py --models"
    assert {row: COLUMNS[name](row) for row in ROWS} == said, "run python docs/generate.py --models"
