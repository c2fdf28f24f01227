"""The pages of benchmarks/ and results/: links and paths lead somewhere, and commands are there with their options."""

import re
import shlex
from importlib.util import find_spec

import pytest
from pages import PAGES, anchors, prose

from benchmarks.commands import ROOT

OURS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "benchmarks" / "README.md", *sorted((ROOT / "results").glob("*.md"))]
}
COMMAND = re.compile(r"python -m (benchmarks\.[\w.]+)([^`\n#&]*)")


@pytest.mark.parametrize("page", OURS)
def test_links_and_paths_lead_somewhere(page):
    folder, text = (ROOT / page).parent, OURS[page]
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        path, _, anchor = link.partition("#")
        target = folder / path if path else ROOT / page
        assert "://" in link or target.exists(), f"{page} links to {link}, which is not there"
        if anchor and "://" not in link:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page} links to {link}: there is no such heading"
    named = re.findall(r"(?<![\w/.])(?:hybrid_lightning|callbacks|configs|results|tests|benchmarks|docs)/[\w./-]*\w/?", text)
    missing = sorted({path for path in named if not (ROOT / path).exists()})
    assert not missing, f"{page} names what is not there: {missing}"


@pytest.mark.parametrize("page", [*OURS, *(page for page in PAGES if "benchmarks." in PAGES[page])])
def test_commands_are_there_with_their_options(page):
    for name, rest in COMMAND.findall({**OURS, **PAGES}[page]):
        assert find_spec(name) is not None, f"{page} names {name}, which is not there"
        if name.startswith("benchmarks.study") or not (words := shlex.split(rest)):
            continue
        module = __import__(name, fromlist=["build_parser"])
        if hasattr(module, "build_parser") and "..." not in words:
            module.build_parser().parse_args(words)
