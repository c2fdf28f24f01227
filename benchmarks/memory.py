"""Compares planned with measured memory, and plans that of Qwen3: `python benchmarks/memory.py`.

Trains models of several kinds and sizes by each method in processes of their own, and writes all numbers as JSON and the tables
as Markdown. benchmarks/README.md says what the numbers mean.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from commands import UsageError, check_at_least, check_common_options, tell
from memory_cases import CASES, MODELS, MemoryCase
from memory_report import markdown, summarize, worst
from pairs import HERE, BenchmarkError, environment, last_line
from report import command_line, machine, versions
from workloads import SMOLLM2


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="memory.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="to measure (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="of each process (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and prompts")
    parser.add_argument("--out", type=Path, default=Path("runs/memory"), help="folder of results and logs (default: %(default)s)")
    return parser.parse_args(arguments)


def check(arguments: argparse.Namespace) -> None:
    """Find out what cannot work before anything is loaded.

    Raises:
        UsageError: With the remedy.
    """
    check_at_least(arguments, 1, "threads")
    needs = SMOLLM2 if "SmolLM2-135M" in arguments.models else "embedded"
    check_common_options(argparse.Namespace(model=needs, device="cpu"))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Plan and measure, and write the JSON."""
    logs = arguments.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    about = {"command": command_line(), "machine": machine(), "versions": versions(), "threads": arguments.threads}
    cases = [case for case in CASES if case.model in arguments.models]
    tell("planning Qwen3")
    lines = start([HERE / "plan_qwen3.py", "--json"], logs / "qwen3.log", arguments.threads)
    result: dict[str, Any] = {**about, "cases": [], "qwen3": json.loads(lines.splitlines()[-1])}
    with tempfile.TemporaryDirectory(prefix="memory_") as place:
        root = Path(place)
        for number, case in enumerate(cases, start=1):
            tell(f"{number} of {len(cases)}: {case.model}, {case.name}")
            found = compare(case, root, logs / f"{number}", arguments)
            result["cases"].append({"case": asdict(case), "name": case.name, **found, **summarize(found)})
            # After each: all of them take an hour or more, and one that fails must not take the others along.
            (arguments.out / "memory.json").write_text(json.dumps(result, indent=1))
    return result


def compare(case: MemoryCase, root: Path, log: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Plan a case, count its tensors, and look at its process: of each, what every rank has found."""
    request = {"cases": [asdict(case)], "root": str(root), "seed": arguments.seed}
    start([HERE / "memory_models.py", json.dumps(request)], log.with_suffix(".model.log"), arguments.threads)
    found = {}
    for what in ("plan", "tensors", "process"):
        with tempfile.TemporaryDirectory(prefix="memory_") as out:
            job = {
                "case": asdict(case),
                "folder": str(root / case.folder),
                "threads": arguments.threads,
                "what": what,
                "out": out,
            }
            start([HERE / "run_memory.py", json.dumps(job)], log.with_suffix(f".{what}.log"), arguments.threads)
            found[what] = [json.loads(file.read_text()) for file in sorted(Path(out).iterdir())]
    return found


def start(command: Sequence[str | Path], log: Path, threads: int) -> str:
    """What a worker prints.

    Raises:
        BenchmarkError: If it fails.
    """
    with log.open("w") as errors:
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**environment(threads), "HF_HUB_OFFLINE": "1"},
            check=False,
        )
    if done.returncode != 0:
        raise BenchmarkError(f"{Path(command[0]).name} failed: {last_line(log)} (its output is in {log})")
    return done.stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 2 if it cannot begin, 1 if something fails on the way."""
    parsed = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        check(parsed)
        result = run(parsed)
    except UsageError as error:
        tell(f"memory.py: {error}")
        return 2
    except (BenchmarkError, OSError) as error:  # the latter such as a folder that cannot be written
        tell(f"memory.py: {error}")
        return 1
    text = markdown(result)
    (parsed.out / "memory_plan.md").write_text(text)
    print(text)
    for name, share in worst(result["cases"]).items():
        print(f"{name}: planned at most {share:.0%} beside what was measured")
    print(f"Written: {parsed.out / 'memory.json'}, {parsed.out / 'memory_plan.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
