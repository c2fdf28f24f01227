"""Compares planned with measured memory, and plans that of Qwen3: `python benchmarks/memory.py`.

Trains the embedded policy and SmolLM2 by each method in a process of its own, and writes all numbers as JSON and the tables as
Markdown. benchmarks/README.md says what the numbers mean.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from commands import UsageError, check_at_least, check_common_options, tell
from memory_report import METHODS, markdown, worst
from pairs import HERE, BenchmarkError, Plan, environment, last_line, prepare
from report import command_line, machine, versions
from workloads import SMOLLM2, WORKLOADS, Workload

# Completions of full length, which is what is planned for.
MEASURED = {
    "embedded": replace(WORKLOADS["tiny"], name="embedded", mean_tokens=20),
    "SmolLM2-135M": replace(WORKLOADS["main"], name="smollm2"),
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="memory.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--models", nargs="+", choices=MEASURED, default=list(MEASURED), help="to measure (default: both)")
    parser.add_argument("--threads", type=int, default=1, help="of each process (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
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
    """Measure and plan, and write the JSON."""
    logs = arguments.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    plan = Plan(0, "cpu", arguments.threads, arguments.seed, (), logs)
    about = {"command": command_line(), "machine": machine(), "versions": versions(), "threads": arguments.threads}
    runs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="memory_") as root:
        for name in arguments.models:
            workload = MEASURED[name]
            tell(f"{name}: preparing model and prompts")
            (folder,) = prepare([workload], Path(root), plan)
            runs[name] = {"settings": asdict(workload), "methods": {}}
            for method in METHODS:
                tell(f"{name}: training by {method}")
                runs[name]["methods"][method] = measure(workload, folder, method, plan)
    tell("planning Qwen3")
    qwen3 = answer([sys.executable, str(HERE / "plan_qwen3.py")], logs / "qwen3.log", plan)
    result = {**about, "runs": runs, "qwen3": qwen3}
    (arguments.out / "memory.json").write_text(json.dumps(result, indent=1))
    return result


def measure(workload: Workload, folder: Path, method: str, plan: Plan) -> dict[str, Any]:
    """One method of one model, in a process of its own."""
    request = {"workload": asdict(workload), "folder": str(folder), "method": method, "threads": plan.threads}
    log = plan.logs / f"{workload.name}_{method.split()[0]}.log"
    found: dict[str, Any] = answer([sys.executable, str(HERE / "run_memory.py"), json.dumps(request)], log, plan)
    return found


def answer(command: list[str], log: Path, plan: Plan) -> Any:
    """The last line that a worker prints.

    Raises:
        BenchmarkError: If it fails.
    """
    with log.open("w") as errors:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**environment(plan.threads), "HF_HUB_OFFLINE": "1"},
            check=False,
        )
    if done.returncode != 0:
        raise BenchmarkError(f"{Path(command[1]).name} failed: {last_line(log)} (its output is in {log})")
    return json.loads(done.stdout.splitlines()[-1])


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
    print(f"Furthest from what was measured: {worst(result['runs']):.0%}")
    print(f"Written: {parsed.out / 'memory.json'}, {parsed.out / 'memory_plan.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
