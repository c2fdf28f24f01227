"""Makes tables and figures of all records: `python -m benchmarks.study.analyse`.

Reads only the records, packed or in files, so anyone can reproduce a number from them. Prints every table, inserts the tables for
which pages have marks between these marks, and draws `accuracy.png` and a `frontier_TASK.png` for each task of the frontier.
"""

import re
import sys
from pathlib import Path

from benchmarks.commands import command
from benchmarks.study import claims
from benchmarks.study.claims import GROUPS, LOOKED_AT, Points, points_of
from benchmarks.study.comparison import UNSEEN, Comparison, compare
from benchmarks.study.figures import draw_accuracies, draw_frontier
from benchmarks.study.store import RESULTS, Store, add_options, store_of
from benchmarks.study.tables import choices, differences, headline, of_task, targets

PAGES = (Path("results/README.md"), RESULTS / "README.md", RESULTS / "frontier.md")
TITLES = {
    "headline": "Accuracy, %",
    "targets": "Targets",
    "choices": "What choices gain over LoRA, points",
    "differences": "Differences, points",
    "unseen": f"Differences on seeds from {UNSEEN} on, which were run after the default score had been chosen",
    "one_size": "The frontier at the size of a hybrid",
    "accuracies": "The frontier, accuracy in %",
    "old_tasks": "The frontier, differences on the tasks on which the formulas were chosen",
    "new_tasks": "The frontier, differences on tasks that neither chose",
    "other_tasks": "The frontier, differences on other tasks",
}


def main() -> None:
    parser = add_options(command("study.analyse", __doc__))
    told = f"with marks to put tables between (default: {', '.join(map(str, PAGES))} for {RESULTS}, none for another folder)"
    parser.add_argument("--pages", type=Path, nargs="*", help=told)
    arguments = parser.parse_args()
    store = store_of(arguments)
    comparisons, frontier = found(store)
    if not comparisons and not frontier:
        sys.exit(f"error: there are no runs in {store.folder} or {store.pack}; make some with python -m benchmarks.study.run")
    tables = tables_of(store, comparisons, frontier)
    pages = arguments.pages
    if pages is None:
        pages = PAGES if arguments.results == RESULTS else ()  # which are about the project's own records
    for page in pages:
        if page.exists():
            page.write_text(filled(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
    arguments.results.mkdir(parents=True, exist_ok=True)
    if comparisons:
        draw_accuracies(comparisons, arguments.results / "accuracy.png")
    for task, points in frontier.items():
        draw_frontier(task, points, arguments.results / f"frontier_{task}.png")
    print("Intervals are of 95%.")
    if comparisons and not tables["differences"]:
        print("LoRA falls short of FFT beyond chance on no task with both and a hybrid, so there is no gap to report.")
    for name, table in tables.items():
        if table:
            print(f"\n## {TITLES.get(name, name)}\n\n{table}")


def found(store: Store) -> tuple[list[Comparison], dict[str, Points]]:
    """The results of each task: its runs, and its points on the frontier by name."""
    comparisons = [comparison for task in store.folders("run") if (comparison := compare(store, task)).rows]
    tasks = dict.fromkeys((*(task for group in GROUPS.values() for task in group), *store.folders("frontier")))
    return comparisons, {task: points for task in tasks if (points := points_of(store, task))}


def tables_of(store: Store, comparisons: list[Comparison], frontier: dict[str, Points]) -> dict[str, str]:
    """All tables, by the names of their marks; a table is empty if its runs do not exist."""
    tables = {**(_of_runs(store, comparisons) if comparisons else {}), **_of_frontier(store, frontier)}
    tables |= {comparison.task: of_task(comparison) for comparison in comparisons}
    return tables | {f"the frontier of {task}": claims.points_table(points) for task, points in frontier.items()}


def _of_runs(store: Store, comparisons: list[Comparison]) -> dict[str, str]:
    """Tables of the runs that begin from the task's start policy, whatever their seed."""
    of_hybrid = [comparison for comparison in comparisons if "hybrid" in comparison.rows]  # others have other ratios alone
    tables = {table.__name__: table(of_hybrid) for table in (headline, targets, choices)}
    with_gap = [comparison for comparison in of_hybrid if comparison.has_gap]
    tables["differences"] = differences(with_gap)
    tables["unseen"] = differences([compare(store, comparison.task, UNSEEN) for comparison in with_gap])
    return tables


def _of_frontier(store: Store, frontier: dict[str, Points]) -> dict[str, str]:
    tables = {"one_size": claims.at_one_size(frontier), "accuracies": claims.accuracies_table(frontier)}
    known = {task for group in GROUPS.values() for task in group}
    for name, group in {**GROUPS, "other_tasks": tuple(task for task in frontier if task not in known)}.items():
        there = {task: frontier[task] for task in group if task in frontier}
        ratios = {task: claims.tuned_ratios(store, task) for task in there}
        tables[name] = claims.claims_table(there, ratios, LOOKED_AT.get(name, 0))
    return tables


def filled(page: str, tables: dict[str, str]) -> str:
    """A page with each table between its marks, `<!-- study: NAME -->` and `<!-- end -->`."""
    for name, text in tables.items():
        marks = re.compile(rf"(<!-- study: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page = marks.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page)
    return page


if __name__ == "__main__":
    main()
