"""Start a function on several gloo processes, as torchrun would, and collect what each returns."""

import os
import pickle
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fork_server import forked, free_port


def _work(rank: int, ranks: int, port: int, scratch: Path, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    # What another test left before the server was started. Lightning seeds ranks, but not one process, by PL_GLOBAL_SEED again.
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)
    if ranks > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK="0", LOCAL_RANK=str(rank))
        os.environ.update(WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    try:
        (scratch / f"{rank}.pickle").write_bytes(pickle.dumps(function(**arguments)))
    except BaseException:
        (scratch / f"{rank}.error").write_text(traceback.format_exc())
        raise


def start(ranks: int, scratch: Path, function: Callable[..., Any], **arguments: Any) -> list[Any]:
    """The processes of a run."""
    scratch.mkdir(parents=True, exist_ok=True)
    port = free_port()
    return [forked(_work, rank, ranks, port, scratch, function, arguments) for rank in range(ranks)]


def wait(processes: list[Any], timeout_s: float) -> None:
    """Wait until all have ended; ended by force and an error after the time."""
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    assert not hanging, f"ranks {hanging} still ran after {timeout_s} s"


def run(ranks: int, scratch: Path, function: Callable[..., Any], timeout_s: float = 60, **arguments: Any) -> list[Any]:
    """Call a function on every rank; what each returns."""
    wait(start(ranks, scratch, function, **arguments), timeout_s)
    errors = [path.read_text() for path in sorted(scratch.glob("*.error"))]
    assert not errors, "\n".join(errors)
    return [pickle.loads((scratch / f"{rank}.pickle").read_bytes()) for rank in range(ranks)]
