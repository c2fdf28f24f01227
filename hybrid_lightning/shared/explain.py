"""What to do when something is wrong, for a terminal: sections of docs/troubleshooting.md, which the package has, too."""

import re
from difflib import get_close_matches
from pathlib import Path

from hybrid_lightning.errors import ConfigError

_PAGE = Path(__file__).parents[1] / "troubleshooting.md"  # a link to docs/ in a source tree
EXPLAIN = "hybrid-lightning explain"  # followed by the name of a section, in messages


def sections() -> dict[str, tuple[str, str]]:
    """Name -> title and text of each section, in Markdown. The first one, whose name is empty, is the overview of the page."""
    parts = re.split(r"^##? (.*)\n", _PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    (first, *titles), texts = parts[::2], parts[1::2]
    names = ["", *(re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles)]
    return dict(zip(names, zip([first, *titles], texts, strict=True), strict=True))


def explanation(name: str | None) -> str:
    """A section of the page in Markdown without links, or the overview and the names of all sections.

    Raises:
        ConfigError: If there is no such section.
    """
    known = sections()
    if (name or "") not in known:
        near = [key for key in known if str(name) in key][:3] or get_close_matches(str(name), known, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else "the command 'explain' lists all of them"
        raise ConfigError(f"no section is called {name!r}; {hint}")
    title, text = known[name or ""]
    if not name:
        text += f"\n`{EXPLAIN} NAME` prints a section:\n\n" + "\n".join(f"- {name}" for name in known if name)
    # Links to sections name the command; pages that are not in the package have no address here.
    text = re.sub(r"\[([^\]]*)\]\(#([^)]*)\)", r"\1 (`explain \2`)", text)
    return f"**{title}**\n\n" + re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
