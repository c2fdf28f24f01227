"""Makes tables and figures of all records: `python -m benchmarks.study.analyse`.

Reads the records alone, packed ones and files, so that whoever doubts a number can make it again from them. Writes `tables.md`
and the figures `accuracy.png`, `curves.png` and `sizes.png`, and puts the tables of all tasks, those of one task, and that of
the frontier at the size of a hybrid between their marks in the pages that have such marks.
"""

import argparse
import re
import sys
from pathlib import Path

from benchmarks.study import score_tables
from benchmarks.study.comparison import UNSEEN, Comparison, compare
from benchmarks.study.cost_table import cost_table
from benchmarks.study.equal_cost import equal_memory, equal_time
from benchmarks.study.figures import draw_accuracies, draw_curves, draw_sizes
from benchmarks.study.frontier_report import GROUPS, at_one_size, points_of
from benchmarks.study.store import RESULTS, Store, add_options, store_of
from benchmarks.study.tables import choices, differences, headline, of_task, ratios, targets

PAGES = (Path("README.md"), Path("docs/method.md"), Path("results/README.md"), Path("results/study/README.md"))

TITLES = {
    "headline": "Accuracy, %",
    "targets": "Targets",
    "choices": "What choices gain over LoRA, points",
    "ratios": "Ratios of the two learning rates",
    "differences": "Differences, points",
    "unseen": f"Differences on seeds from {UNSEEN} on, which were run after the default score had been chosen",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument(
        "--pages",
        type=Path,
        nargs="*",
        help=f"with marks to put tables between (default: {', '.join(map(str, PAGES))} for {RESULTS}, none for another folder)",
    )
    arguments = parser.parse_args()
    store = store_of(arguments)
    comparisons = [comparison for task in store.folders("run") if (comparison := compare(store, task)).rows]
    if not comparisons:
        sys.exit(f"error: no runs in {store.folder}/run or {store.pack}; make some with python -m benchmarks.study.run")
    # Others have hybrids of another ratio of rates alone.
    of_hybrid = [comparison for comparison in comparisons if "hybrid" in comparison.rows]
    parts = {table.__name__: table(of_hybrid) for table in (headline, targets, choices, ratios)}
    with_gap = [comparison for comparison in of_hybrid if comparison.has_gap]
    parts["differences"] = differences(with_gap)
    parts["unseen"] = differences([compare(store, comparison.task, UNSEEN) for comparison in with_gap])
    page_text = _page(store, comparisons, parts)
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "tables.md").write_text(page_text, encoding="utf-8")
    draw_accuracies(comparisons, arguments.results / "accuracy.png")
    draw_curves(comparisons, arguments.results / "curves.png")
    draw_sizes(comparisons, arguments.results / "sizes.png")
    frontier = {task: points_of(store, task) for group in GROUPS.values() for task in group}
    marked = {**parts, **{comparison.task: of_task(comparison) for comparison in comparisons}, "one_size": at_one_size(frontier)}
    pages = arguments.pages
    if pages is None:
        pages = PAGES if arguments.results == RESULTS else ()  # which are about the project's own records
    for page in pages:
        if page.exists():
            page.write_text(_filled(page.read_text(encoding="utf-8"), marked), encoding="utf-8")
    print(page_text)


def _page(store: Store, comparisons: list[Comparison], parts: dict[str, str]) -> str:
    sections = []
    for comparison in comparisons:
        sections.append(f"## {comparison.task}\n\n{of_task(comparison)}\n")
        sections.append(f"At equal memory of what is trained (weights, gradients, Adam):\n\n{equal_memory(comparison)}\n")
        if in_time := equal_time(comparison):
            sections.append(f"At equal time (of the processor, each run one thread):\n\n{in_time}\n")
    for task in store.folders("scores"):
        sections.append(f"## Scores on {task}\n\n{score_tables.of_task(store, task)}\n")
    if store.within("cost"):
        sections.append(f"## Cost\n\n{cost_table(store)}\n")
    text = "Made by `python -m benchmarks.study.analyse` of the records beside this file. Intervals are of 95%."
    if not parts["differences"]:
        text += " LoRA falls short of FFT beyond chance on no task with both and a hybrid, so that no gap is spoken of."
    titled = [f"## {TITLES[name]}\n\n{part}\n" for name, part in parts.items() if part]
    return "\n".join(["# Tables of the study\n", f"{text}\n", *titled, *sections])


def _filled(page: str, parts: dict[str, str]) -> str:
    """A page with each part between its marks, `<!-- study: NAME -->` and `<!-- end -->`."""
    for name, text in parts.items():
        page = re.sub(
            rf"(<!-- study: {name} -->\n).*?(<!-- end -->)",
            lambda found, text=text: f"{found[1]}{text}\n{found[2]}",
            page,
            flags=re.DOTALL,
        )
    return page


if __name__ == "__main__":
    main()
