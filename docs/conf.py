"""How Sphinx builds these pages: `sphinx-build -W docs docs/_build`.

The pages are plain Markdown. This file makes whatever else Sphinx needs: the tables of contents from the links of the index, a
page with the docstrings of each room, and a page from the notebook.
"""

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import generate  # noqa: E402
from bs4 import BeautifulSoup  # noqa: E402  # which the theme requires

from hybrid_lightning.shared.configurable import Configurable  # noqa: E402

project = "hybrid_lightning"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown", ".ipynb": "markdown", ".rst": "restructuredtext"}
root_doc = "index"
exclude_patterns = ["_build"]
html_theme = "furo"
highlight_language = "none"  # of blocks that name none: diagrams, trees
html_title = "hybrid_lightning"
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["pages.css"]
myst_heading_anchors = 4
autodoc_typehints = "none"  # the signature has them
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
python_maximum_signature_line_length = 100
napoleon_use_rtype = False
WIDE = 2  # a table with more columns becomes a list on a narrow screen
# What people search for, where the section's title has other words: page, section -> words.
SEARCHED = {
    ("troubleshooting", "Ask the doctor"): "! doctor",
    ("troubleshooting", "Out of memory"): "! OOM, ! CUDA out of memory",
    ("troubleshooting", "The reward does not move"): "! reward 0, ! reward stays 0",
    ("trl", "Names in TRL and here"): "! num_generations",
}


def setup(app: Any) -> None:
    """Make what GitHub does not show."""
    app.connect("builder-inited", write_rooms)
    app.connect("source-read", add_contents)
    app.connect("html-page-context", complete_page, priority=400)  # before the theme
    app.connect("autodoc-process-docstring", as_rst, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-skip-member", skip)


def write_rooms(app: Any) -> None:
    """A page for each room, with the docstrings of its public names."""
    folder = HERE / "reference" / "api"
    folder.mkdir(exist_ok=True)
    for room in generate.ROOMS:
        title = f"hybrid_lightning.{room}"
        lines = [title, "=" * len(title), "", f".. currentmodule:: {title}", ""]
        for name, value in generate.public(room).items():
            lines += [f".. auto{'class' if inspect.isclass(value) else 'function'}:: {name}", ""]
        path, text = folder / f"{room}.rst", "\n".join(lines)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    for path in folder.glob("*.rst"):
        if path.stem not in generate.ROOMS:
            path.unlink()


def add_contents(app: Any, page: str, source: list[str]) -> None:
    """The links of each section of the index, in their order, are the contents of the site."""
    here = (HERE / f"{page}.md").parent
    if page == "notebook":
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(source[0])["cells"]]
        source[0] = "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in cells)

    def link(found: re.Match[str]) -> str:
        outside = not (here / found[1]).resolve().is_relative_to(HERE)
        return f"](path:{found[1]})" if outside else found[0]  # a file of the repository, not a page

    source[0] = re.sub(r"\]\(((?:\.\./)+[\w./-]+\.(?:md|yaml|py))\)", link, source[0])
    if page == "reference/api":
        source[0] += "\n" + _toctree("", [f"api/{room}" for room in generate.ROOMS])
    if page == "index":
        for title, section in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", source[0], re.DOTALL | re.MULTILINE):
            links = re.findall(r"^- \[(.*?)\]\(([\w/-]+)(\.md|\.ipynb)(#[\w-]+)?\)", section, re.MULTILINE)
            source[0] += "\n" + _toctree(title, [_entry(*link) for link in links])
    for (where, title), words in SEARCHED.items():
        if where == page:
            before, heading, after = source[0].partition(f"\n## {title}\n")
            assert heading, f"SEARCHED in docs/conf.py: {page}.md has no section {title}"
            source[0] = f"{before}{heading}\n```{{index}} {words}\n```\n{after}"


def _entry(text: str, page: str, kind: str, place: str) -> str:
    """A page by its own title; a place in a page, and the notebook, by the text of the link."""
    if place:
        return f"{text} <page://{page}{place}>"
    return page if kind == ".md" else f"{text} <{page}>"


def _toctree(caption: str, pages: list[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", *([f":caption: {caption}"] if caption else []), "", *pages, "```", ""])


def complete_page(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Lead the contents' links to sections there; let names in tables break; name the column in each cell of a wide table."""
    contents = context["toctree"]

    def link(found: re.Match[str]) -> str:
        return f'internal" href="{context["pathto"](found[1])}{found[2]}"'

    context["toctree"] = lambda **options: re.sub(r'external" href="page://([\w/-]+)(#[\w-]+)"', link, contents(**options))
    if "<table" in context.get("body", ""):
        body = BeautifulSoup(context["body"], "html.parser")
        for name in body.select("table code span.pre"):
            parts = re.split(r"(?<=[_/.,=:])(?=\w)|(?<=[a-z\d])(?=[A-Z])", name.string or "")
            name.clear()
            for part in parts:
                name.extend([part, body.new_tag("wbr")])
        for table in body.find_all("table"):
            titles = [title.get_text(" ", strip=True) for title in table.find_all("th")]
            if len(titles) > WIDE:
                table["class"] = [*table["class"], "wide"]
                for row in table.find_all("tr"):
                    for title, cell in zip(titles, row.find_all("td"), strict=False):
                        if cell.get_text(strip=True):
                            cell["data-title"] = title
        context["body"] = str(body)


def as_rst(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with `names` and indented formulas, which reStructuredText marks in other ways."""
    blocks = re.split(r"\n[ \t]*\n", "\n".join(lines))
    for number, block in enumerate(blocks):
        inside = number > 0 and re.match(r"(Args|Returns|Raises|Yields|Attributes|Example|Note)s?:", blocks[number - 1])
        if ">>>" in block:
            continue
        if block.startswith("    ") and not inside:
            blocks[number] = f"::\n\n{block}"
        elif re.match(r"\|.*\|\n\|-", block):  # a table
            blocks[number] = "::\n\n" + re.sub(r"^", "    ", block, flags=re.MULTILINE)
        else:
            blocks[number] = _marked(block)
    lines[:] = "\n\n".join(blocks).split("\n")
    if what == "property":  # napoleon would take the word before a colon for its type
        lines[:1] = [lines[0].replace(": ", "; ", 1)]


def _marked(text: str) -> str:
    parts = re.split(r"``?", text)
    if len(parts) % 2 == 0:  # an unpaired backquote
        return text.replace("`", r"\`")
    for number, part in enumerate(parts):
        if number % 2:
            follows = parts[number + 1][:1]
            before = parts[number - 1][-1:]
            parts[number] = ("\\ " if before.isalnum() else "") + f"``{part}``" + ("\\ " if follows.isalnum() else "")
        else:
            parts[number] = re.sub(r"(?<!\*)\*(?!\*|\w+:)|\|(?=\S)|(?<=\w)_(?!\w)", lambda found: "\\" + found[0], part)
    return "".join(parts)


def signature(app: Any, what: str, name: str, thing: Any, options: Any, given: str | None, returns: str | None) -> Any:
    """The constructor's signature; `Configurable` notes the arguments there. Types are in the text or in the configuration."""
    if what != "class" or not issubclass(thing, Configurable):
        return None
    parameters = list(inspect.signature(thing.__init__).parameters.values())[1:]
    return str(inspect.Signature([parameter.replace(annotation=parameter.empty) for parameter in parameters])), returns


def skip(app: Any, what: str, name: str, thing: Any, skipped: bool, options: Any) -> bool | None:
    """Leave out what comes from a library."""
    module = getattr(thing, "__module__", None)
    return True if isinstance(module, str) and module.split(".")[0] in ("lightning", "torch") else None
