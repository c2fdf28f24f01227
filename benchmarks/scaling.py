"""Measures how the time of a training step grows with its sizes: `python benchmarks/scaling.py`.

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
from pairs import BenchmarkError, Job, Plan, prepare, take_turns
from report import command_line, machine, versions
from scaling_report import Series, summarize, tables
from workloads import WORKLOADS, Workload

SAME = ("trainable_parameters", "threads", "device")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="scaling.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of each size, after one that is discarded")
    sizes = {"completion-tokens": [16, 32, 64, 128], "samples": [2, 4, 8, 16], "prompt-tokens": [32, 64, 128, 256, 512]}
    for name, values in sizes.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", default=values, help="sizes to measure (default: %(default)s)")
    parser.add_argument(
        "--fixed",
        type=int,
        nargs=3,
        default=[128, 8, 64],
        metavar=("PROMPT", "SAMPLES", "COMPLETION"),
        help="sizes while another is varied; prompts are varied with the shortest completion (default: %(default)s)",
    )
    parser.add_argument("--prompts", type=int, default=1, help="of a rollout (default: %(default)s)")
    add_common_options(parser, "runs/scaling")
    return parser.parse_args(arguments)


def check(arguments: argparse.Namespace) -> None:
    """Find out what cannot work before anything is loaded.

    Raises:
        UsageError: With the remedy.
    """
    check_at_least(arguments, 1, "rounds", "threads", "prompts", "completion-tokens", "prompt-tokens", "fixed")
    check_at_least(arguments, 2, "samples")  # or no completion would differ from the mean of its group
    if arguments.fixed[1] < 2:
        raise UsageError(f"--fixed needs at least 2 samples of a prompt, got {arguments.fixed[1]}")
    for option in ("completion-tokens", "samples", "prompt-tokens"):
        values = getattr(arguments, option.replace("-", "_"))
        if len(values) < 3 or values != sorted(set(values)):
            raise UsageError(f"--{option} needs at least 3 sizes, all different, smallest first, got {values}")
    check_common_options(arguments)


def all_series(arguments: argparse.Namespace) -> list[Series]:
    """What is measured; the prompt is varied with short completions, so that it is much of the work."""
    prompt, samples, completion = arguments.fixed
    base = replace(
        WORKLOADS["main"],
        model=arguments.model,
        prompts=arguments.prompts,
        prompt_tokens=prompt,
        samples=samples,
    )
    short = arguments.completion_tokens[0]
    completions = [(n, full_length(base, n, name=f"completion_{n}")) for n in arguments.completion_tokens]
    groups = [(n, full_length(base, completion, name=f"samples_{n}", samples=n)) for n in arguments.samples]
    lengths = arguments.prompt_tokens
    prompts = [(n * samples, full_length(base, short, name=f"prompt_{n}", prompt_tokens=n)) for n in lengths]
    return [
        Series("completion", f"completion tokens (G = {samples}, prompt {prompt})", tuple(completions), linear=True),
        Series("samples", f"G (completion {completion}, prompt {prompt})", tuple(groups), linear=True),
        Series("prompt", f"prompt tokens x G (G = {samples}, completion {short})", tuple(prompts), linear=False),
    ]


def full_length(base: Workload, tokens: int, **sizes: Any) -> Workload:
    """That workload with completions of so many tokens, none of them shorter."""
    return replace(base, max_new_tokens=tokens, mean_tokens=tokens, **sizes)


def prepare_all(series: list[Series], folder: Path, plan: Plan) -> dict[int | None, Path]:
    """One folder of model and prompts for each prompt length: they differ in nothing else."""
    lengths: dict[int | None, Workload] = {}
    for one in series:
        for _, workload in one.points:
            lengths.setdefault(workload.prompt_tokens, workload)
    return dict(zip(lengths, prepare(list(lengths.values()), folder, plan), strict=True))


def run(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure all series; those that are finished are on disk, whatever happens later."""
    logs = arguments.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    plan = Plan(arguments.rounds, arguments.device, arguments.threads, arguments.seed, ("ours",), logs, same=SAME)
    about = {"command": command_line(), "machine": machine(), "versions": versions(), "threads": plan.threads, "seed": plan.seed}
    series = all_series(arguments)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="scaling_") as folder:
        tell("preparing models and prompts")
        folders = prepare_all(series, Path(folder), plan)
        for one in series:
            tell(f"loading the model {len(one.points)} times")
            jobs: list[Job] = [("ours", workload, folders[workload.prompt_tokens]) for _, workload in one.points]
            _, steps = take_turns(jobs, plan, tell)
            results[one.name] = summarize(one, steps)
            content = {**about, "device": plan.device, "series": results}
            (arguments.out / "scaling.json").write_text(json.dumps(content, indent=1))
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 2 if it cannot begin, 1 if something fails on the way."""
    parsed = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        check(parsed)
        results = run(parsed)
    except UsageError as error:
        tell(f"scaling.py: {error}")
        return 2
    except (BenchmarkError, OSError) as error:  # the latter such as a folder that cannot be written
        tell(f"scaling.py: {error}")
        return 1
    print(tables(results))
    from scaling_figure import draw  # here, so that the process is small while workers are measured

    draw(results, f"Time of a training step, {parsed.device}, {parsed.threads} threads", parsed.out / "scaling.png")
    print(f"\nWritten: {parsed.out / 'scaling.json'}, {parsed.out / 'scaling.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
