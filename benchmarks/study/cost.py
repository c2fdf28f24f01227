"""Measures what each method costs, each run alone in a process of its own: `python -m benchmarks.study.cost`.

To be run on an idle machine, one run after the other. The model is small, so that the process is mostly Python and libraries;
`benchmarks/methods.py` measures memory on SmolLM2.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.study.methods import METHODS
from benchmarks.study.pool import add_options, methods_of, tasks_of
from benchmarks.study.ranks import rank_of
from benchmarks.study.runner import arguments, commit, read_task
from benchmarks.study.store import store_of, write

STEPS = 20


def measure(task: str, name: str, rank: int | None, threads: int) -> dict[str, float | str]:
    """One short run: seconds by phase, the most memory of the process, and what it trained and saved."""
    method = METHODS[name]
    supervised = read_task(task)["model"].get("class_path", "").endswith("SupervisedModule")
    with tempfile.TemporaryDirectory() as folder:
        options = {
            **method.options(read_task(task), rank, 1e-4, 0),
            "trainer.max_steps": STEPS,
            "trainer.limit_val_batches": 0,
            "trainer.enable_progress_bar": False,
            "trainer.logger.save_dir": folder,
            "trainer.logger.name": "cost",
            "checkpoint.monitor": None,
        }
        if method.module is not None:
            options["model"] = method.supervised_module if supervised else method.module
        command = [sys.executable, "-m", "hybrid_lightning", "fit", "--config", task, *arguments(options)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        log = os.open(Path(folder) / "log", os.O_CREAT | os.O_WRONLY)
        to_log = [(os.POSIX_SPAWN_DUP2, log, stream) for stream in (1, 2)]
        process = os.posix_spawn(sys.executable, command, environment, file_actions=to_log)
        _, status, usage = os.wait4(process, 0)
        if status:
            raise SystemExit(f"error: {name} on {task} failed: {(Path(folder) / 'log').read_text()[-500:]}")
        run = Path(folder) / "cost" / "version_0"
        seconds = json.loads((run / "summary.json").read_text(encoding="utf-8"))["seconds_by_phase"]
        saved = run / "checkpoints" / "last.ckpt"
        state = torch.load(saved, weights_only=True)
        return {
            "commit": commit(),
            "seconds_per_step": sum(seconds[phase] for phase in ("generate", "reward", "logprobs", "update", "other")) / STEPS,
            "scoring_seconds": seconds["scoring"],
            "peak_bytes": usage.ru_maxrss * 1024,
            "trainable_parameters": sum(value.numel() for value in state["state_dict"].values()),
            "optimizer_bytes": _bytes(state["optimizer_states"]),
            "checkpoint_bytes": saved.stat().st_size,
        }


def _bytes(value: object) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_bytes(item) for item in value.values())
    return sum(_bytes(item) for item in value) if isinstance(value, (list, tuple)) else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each method, in turn; default: %(default)s")
    given = parser.parse_args()
    store = store_of(given)
    names = [name for name in methods_of(given) if not METHODS[name].frozen_rest]  # whose plan is no option of the command line
    for task in tasks_of(given):
        rounds: dict[str, list[dict[str, float | str]]] = {name: [] for name in names}
        for _ in range(given.rounds):
            for name in names:
                rounds[name].append(measure(task, name, rank_of(METHODS[name], store, Path(task).stem), given.workers))
                print(Path(task).stem, name, rounds[name][-1], flush=True)
        content = {"threads": given.workers, "steps": STEPS, "rounds": rounds}
        write(content, store.folder / "cost" / f"{Path(task).stem}.json")


if __name__ == "__main__":
    main()
