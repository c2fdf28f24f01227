"""The parent's side of a comparison: starts a worker for each side, and lets the workers do one step each in turn."""

import argparse
import json
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.commands import BenchmarkError, environment, last_line, run_logged, tell
from benchmarks.workloads import Settings, Workload

WORKERS = {"trl": ("-m", "benchmarks.speed.run_trl"), "ours": ("-m", "benchmarks.speed.run_ours")}
SAME = ("trainable_parameters", "prompt_digest", "threads", "device")  # of all sides
Job = tuple[str, Workload, Path]  # what a worker does: side, workload, and the folder that prepare.py wrote


@dataclass(frozen=True)
class Plan:
    """How to compare."""

    pairs: int
    device: str
    threads: int
    seed: int
    sides: tuple[str, ...]
    logs: Path  # folder for what the workers print
    overrides: dict[str, Any] = field(default_factory=dict)  # of TRL's settings
    workers: Mapping[str, Sequence[str]] = field(default_factory=lambda: WORKERS)  # of each side, the arguments of Python
    same: tuple[str, ...] = SAME  # facts that all sides must agree on

    @classmethod
    def of(cls, given: argparse.Namespace, sides: Sequence[str], worker: str = "", **more: Any) -> "Plan":
        """Make the plan from the options of a command, and the folder of logs."""
        logs = given.out / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        if worker:
            more["workers"] = dict.fromkeys(sides, ("-m", worker))
        pairs = given.pairs if "pairs" in given else given.rounds
        return cls(pairs, given.device, given.threads, given.seed, tuple(sides), logs, **more)


class Worker:
    """One side's process."""

    def __init__(self, side: str, workload: Workload, folder: Path, plan: Plan) -> None:
        self.side, self.workload, self.log = side, workload, plan.logs / f"{workload.name}_{side}.log"
        tried = plan.overrides if side == "trl" else {}
        settings = Settings(workload, folder, plan.device, plan.threads, plan.pairs + 1, plan.seed, side, tried)
        variables = {**environment(plan.threads), "HF_HUB_OFFLINE": "1"}
        with self.log.open("w") as log:
            streams: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
            started = [sys.executable, *plan.workers[side], settings.as_argument()]
            self.process = subprocess.Popen(started, env=variables, **streams)
        self.facts = self._answer()

    def step(self) -> dict[str, Any]:
        """Let it do one step; returns its report, with the number of `tokens` and `rows` for the length of each."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        report = self._answer()
        lengths = report.pop("lengths")
        check_lengths(self.workload, self.side, lengths)
        return {**report, "tokens": sum(lengths), "rows": len(lengths)}

    def close(self) -> None:
        """End the process, by force if it does not end by itself."""
        if self.process.stdin is not None and self.process.poll() is None:
            self.process.stdin.close()
            try:
                self.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self.process.wait()
        said = f"it was killed by signal {-code}, perhaps out of memory" if code < 0 else last_line(self.log)
        raise BenchmarkError(f"the {self.side} side ended too early: {said} (its output is in {self.log})")


@contextmanager
def prepared(workloads: list[Workload], plan: Plan) -> Iterator[list[Path]]:
    """Folders with models and prompts of the workloads, written by another process; they exist as long as this context."""
    with TemporaryDirectory(prefix="benchmark_") as root:
        folders = [Path(root, workload.name) for workload in workloads]
        given = {"workloads": list(map(asdict, workloads)), "folders": list(map(str, folders))}
        request = {**given, "rollouts": plan.pairs + 1, "seed": plan.seed, "threads": plan.threads}
        if workloads:
            tell("preparing models and prompts")
            run_logged(["-m", "benchmarks.prepare", json.dumps(request)], plan.logs / "prepare.log", environment(plan.threads))
        yield folders


def compare(workload: Workload, folder: Path, plan: Plan) -> dict[str, Any]:
    """`facts` and `steps` of each side: its reports of a discarded step and of `plan.pairs` measured steps, in turn."""
    facts, steps = take_turns([(side, workload, folder) for side in plan.sides], plan)
    return {"facts": dict(zip(plan.sides, facts, strict=True)), "steps": dict(zip(plan.sides, steps, strict=True))}


def take_turns(jobs: Sequence[Job], plan: Plan) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """The facts of a worker for each job, and all its steps: one step each in turn, `plan.pairs` times after a discarded one."""
    workers: list[Worker] = []
    steps: list[list[dict[str, Any]]] = [[] for _ in jobs]
    try:
        for job in jobs:
            workers.append(Worker(*job, plan))
        facts = [worker.facts for worker in workers]
        check_equal({f"{worker.side}, {worker.workload.name}": worker.facts for worker in workers}, plan.same)
        for number in range(plan.pairs + 1):
            for worker, done in zip(workers, steps, strict=True):
                report = worker.step()
                done.append(report)
                turn = f"round {number} of {plan.pairs}" if number else "warm-up"
                spent = f"{report['seconds']:.2f} s, {report['processor_seconds']:.2f} s of processors"
                tell(f"{worker.workload.name}, {turn}: {worker.side} {spent}")
    finally:
        deque(map(Worker.close, workers), maxlen=0)
    return facts, steps


def check_lengths(workload: Workload, side: str, lengths: list[int]) -> None:
    """Check that each step completes every prompt of its rollout, to the full length if completions do not end by themselves."""
    longest = workload.turns * workload.max_new_tokens
    shortest = longest if workload.full_length else 1
    if len(lengths) != workload.rows or min(lengths) < shortest or max(lengths) > longest:
        raise BenchmarkError(
            f"the {side} side made {len(lengths)} completions of {min(lengths)} to {max(lengths)} tokens where {workload.rows} "
            f"of {shortest} to {longest} are wanted; report this as a bug of the benchmark"
        )


def check_equal(facts: dict[str, dict[str, Any]], same: Sequence[str] = SAME) -> None:
    """Check that all sides train the same number of parameters on the same prompts with the same number of threads."""
    for name in same:
        values = {side: fact[name] for side, fact in facts.items()}
        if len(set(values.values())) > 1:
            raise BenchmarkError(f"the sides do not do the same, {name} differs: {values}; report this as a bug of the benchmark")
