"""Compares a training step of LoRA, hybrid and full fine-tuning, all of this project: `python benchmarks/methods.py`.

Prints tables, and writes all measurements as JSON and a figure as PNG. benchmarks/README.md says what the numbers mean.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from commands import UsageError, add_common_options, check_at_least, check_common_options, tell
from methods_report import METHODS, summarize, tables
from pairs import HERE, BenchmarkError, Plan, compare, prepare
from report import command_line, machine, versions
from workloads import WORKLOADS, Workload

MAIN = WORKLOADS["main"]
SAME = ("prompt_digest", "threads", "device", "base_bytes")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="methods.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each method, after one that is discarded")
    sizes = {"prompts": MAIN.prompts, "samples": MAIN.samples, "prompt-tokens": MAIN.prompt_tokens}
    for name, size in {**sizes, "max-new-tokens": MAIN.max_new_tokens}.items():
        parser.add_argument(f"--{name}", type=int, default=size, help="of a rollout (default: %(default)s)")
    add_common_options(parser, "runs/methods")
    return parser.parse_args(arguments)


def check(arguments: argparse.Namespace) -> None:
    """Find out what cannot work before anything is loaded.

    Raises:
        UsageError: With the remedy.
    """
    check_at_least(arguments, 1, "rounds", "threads", "prompts", "prompt-tokens", "max-new-tokens")
    check_at_least(arguments, 2, "samples")  # or no completion would differ from the mean of its group
    check_common_options(arguments)


def chosen_workload(arguments: argparse.Namespace) -> Workload:
    """The main workload, with the sizes and the model that were asked for; all completions have the full length."""
    names = ("model", "prompts", "samples", "prompt_tokens", "max_new_tokens")
    sizes = {name: getattr(arguments, name) for name in names}
    return replace(MAIN, name="methods", mean_tokens=arguments.max_new_tokens, **sizes)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, and write the JSON."""
    logs = arguments.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    scripts = dict.fromkeys(METHODS, HERE / "run_methods.py")
    plan = Plan(
        arguments.rounds, arguments.device, arguments.threads, arguments.seed, tuple(METHODS), logs, scripts=scripts, same=SAME
    )
    about = {"command": command_line(), "machine": machine(), "versions": versions(), "threads": plan.threads, "seed": plan.seed}
    workload = chosen_workload(arguments)
    with tempfile.TemporaryDirectory(prefix="methods_") as folder:
        tell("preparing model and prompts")
        (prepared,) = prepare([workload], Path(folder), plan)
        tell("loading the model three times, and scoring for hybrid")
        result = summarize(workload, compare(workload, prepared, plan, tell), plan.device)
    (arguments.out / "methods.json").write_text(json.dumps({**about, "device": plan.device, **result}, indent=1))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 2 if it cannot begin, 1 if something fails on the way."""
    parsed = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        check(parsed)
        result = run(parsed)
    except UsageError as error:
        tell(f"methods.py: {error}")
        return 2
    except (BenchmarkError, OSError) as error:  # the latter such as a folder that cannot be written
        tell(f"methods.py: {error}")
        return 1
    print(tables(result))
    from methods_figure import draw  # here, so that the process is small while workers are measured

    draw(result, f"LoRA, hybrid and FFT, {parsed.device}, {parsed.threads} threads", parsed.out / "methods.png")
    print(f"\nWritten: {parsed.out / 'methods.json'}, {parsed.out / 'methods.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
