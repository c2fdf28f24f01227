"""README, CONTRIBUTING and docs as tests read them: blocks, commands, links, headings."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *DOCS)
}
README = PAGES["README.md"]
BESIDE = [ROOT / "benchmarks" / "README.md", *sorted((ROOT / "results").glob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
ALL_PAGES = PAGES | {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in BESIDE}
GENERATED = ("docs/reference/api.md", "docs/reference/configuration.md")


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def examples() -> dict[str, str]:
    """Name -> code of the blocks that are marked to be run; one that is on two pages is the same on both."""
    found: dict[str, str] = {}
    for page, text in PAGES.items():
        for name, code in re.findall(r"^<!-- run: (\w+) -->\n```(?:python|yaml)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            assert found.setdefault(name, code) == code, f"{page} has another {name} than a page before it"
    return found


def shell_commands() -> list[list[str]]:
    """Every command of every shell block, in words."""
    lines = "".join(block for text in PAGES.values() for block in blocks("bash", text)).replace("\\\n", " ").splitlines()
    return [words for line in lines for part in line.split("&&") if (words := shlex.split(part, comments=True))]


def commands() -> list[tuple[str, ...]]:
    """Arguments of every `... -m hybrid_lightning ARGUMENTS`, each once."""
    places = [(words, words.index("hybrid_lightning")) for words in shell_commands() if "hybrid_lightning" in words]
    return list(dict.fromkeys(tuple(words[place + 1 :]) for words, place in places if words[place - 1] == "-m"))


def prose(text: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def links(page: str) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(ALL_PAGES[page])) if "://" not in link]


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub and MyST make them."""
    titles = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def tree(page: str) -> list[str]:
    """The paths that a page's tree names."""
    (text,) = re.findall(r"^## The tree\n\n```\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE)
    entries, folder = [], ""
    for line in text.splitlines():
        found = re.match(r"( *)(\S+(?:, \S+)*)  ", line + "  ")
        assert found, line
        indent, names = found.groups()
        if not indent:
            folder = names if names.endswith("/") else ""
        entries += [(folder if indent else "") + name for name in names.split(", ")]
    return entries
