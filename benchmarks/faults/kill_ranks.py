"""Kills ranks of training jobs at random moments, and resumes from the checkpoints: `python -m benchmarks.faults.kill_ranks`.

Each job trains the embedded policy in two processes, with a checkpoint after every step, and one process gets SIGKILL. The job
must end soon, with a message and a nonzero exit code; every checkpoint on the disk must load; and resuming from the newest must
give the weights of an undisturbed job. Prints a line for each kill and a table, and writes both as JSON.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.commands import BenchmarkError, about, check_at_least, command, entry, tell
from benchmarks.faults.kill_job import CASES, LAUNCHERS, STEPS, Job, Moment
from benchmarks.faults.kill_job import command as command_of
from benchmarks.tables import table
from hybrid_lightning.sharding.checkpoints import WholeFiles

LIMIT_S = 60.0  # for all processes to end once one has been killed
JOB_LIMIT_S = 600.0  # for a job that nobody disturbs
TOLERANCE = 1e-5  # between weights, float32
# Messages that a process is gone, and their sources. The first one gives the remedy.
_MESSAGES = {
    "ours": r"rank \d (?:lost contact.*(?:--ckpt_path \S+|no checkpoint has been saved yet)|ends: rank 0)",
    "Lightning": r"Child process with PID \d+ terminated with code",
    "torchrun": r"Signal 9 \(SIGKILL\) received by PID|exitcode\s*: -9",
}
HEADER = ["checkpoints", "started by", "jobs", "right", "in a write", "resumed", "weights differ by", "gone after, s"]


@dataclass(frozen=True)
class Undisturbed:
    """A job that ran to its end."""

    weights: dict[str, Tensor]
    first_write_s: float
    end_s: float


@dataclass(frozen=True)
class Outcome:
    """The result of a job."""

    case: str
    launcher: str
    rank: int
    moment: str
    alone: bool  # whether no other process was left that could report anything
    writing: bool  # whether a half-written or half-removed checkpoint lay there just after the kill
    seconds: float | None  # until all its processes had ended; None if that took too long
    code: int
    messages: tuple[str, ...]
    loaded: int = 0  # checkpoints found; all loaded unless there is an error
    step: int | None = None  # of the newest
    difference: float | None = None  # of the final weights from an undisturbed job's
    error: str = ""

    @property
    def verdict(self) -> str:
        """`right`, or what was wrong."""
        if self.seconds is None:
            return "processes were left"
        if self.code == 0:
            return "ended with 0"
        if not self.messages and not self.alone:
            return "said nothing"
        if self.error:
            return self.error
        if self.loaded and (self.difference is None or self.difference > TOLERANCE):
            return "other weights"
        return "right"


def build_parser() -> argparse.ArgumentParser:
    parser = command("faults.kill_ranks", __doc__, seed=0, out=Path("runs/kill_ranks"))
    parser.add_argument("--times", type=int, default=20, help="how often (default: %(default)s)")
    return parser


def undisturbed(case: str, out: Path) -> Undisturbed:
    """Run a job to its end; raises if it fails."""
    job = Job(command_of(case, "the command"), out / "undisturbed" / case, out / f"undisturbed {case}.log")
    job.wait(job.checkpoints.exists, JOB_LIMIT_S)
    first_write_s = job.seconds
    job.wait(lambda: False, JOB_LIMIT_S)
    end_s = job.seconds
    job.end(LIMIT_S)
    if job.main.returncode:
        raise BenchmarkError(f"{case}: a job that nobody disturbed ended with {job.main.returncode} (its output is in {job.log})")
    return Undisturbed(load(job.checkpoints / "last.ckpt")["state_dict"], first_write_s, end_s)


def load(path: Path) -> dict[str, Any]:
    """Load a whole checkpoint."""
    return WholeFiles().load_checkpoint(path, weights_only=True)


def kill_once(number: int, arguments: argparse.Namespace, whole: dict[str, Undisturbed]) -> Outcome:
    """Start a job, kill a rank, check the checkpoints and resume."""
    generator = random.Random(f"{arguments.seed} {number}")
    case = list(CASES)[number % len(CASES)]
    launcher = list(LAUNCHERS)[number // len(CASES) % len(LAUNCHERS)]
    outcome = None
    while outcome is None:  # if the job ended before the moment, draw another
        shutil.rmtree(arguments.out / f"{number:02d}", ignore_errors=True)
        job = Job(command_of(case, launcher), arguments.out / f"{number:02d}", arguments.out / f"{number:02d}.log")
        rank = generator.randrange(2)
        outcome = kill(job, case, launcher, rank, Moment.draw(generator, whole[case].first_write_s, whole[case].end_s))
    return resume(outcome, job, whole[case], arguments.out / f"{number:02d}_resumed.log")


def kill(job: Job, case: str, launcher: str, rank: int, moment: Moment) -> Outcome | None:
    """Kill a rank of a running job, and wait for the job's end; None if the job had already done all its work."""
    if not moment.wait(job, JOB_LIMIT_S) or not job.wait(lambda: job.rank(rank) is not None, JOB_LIMIT_S):
        job.end(LIMIT_S)
        return None
    process = job.rank(rank)
    assert process is not None, "it has just been there"
    alone = job.family.members().keys() == {process}
    os.kill(process, signal.SIGKILL)
    writing = job.writes()
    seconds = job.end(LIMIT_S)
    code = job.main.returncode
    if code == 0 and load(job.checkpoints / "last.ckpt")["global_step"] == STEPS:
        return None
    return Outcome(case, launcher, rank, str(moment), alone, writing, seconds, code, said(job.log.read_text()))


def said(log: str) -> tuple[str, ...]:
    """Who reports in a log that a process has died."""
    return tuple(name for name, pattern in _MESSAGES.items() if re.search(pattern, log))


def resume(outcome: Outcome, job: Job, whole: Undisturbed, log: Path) -> Outcome:
    """Load all checkpoints, and resume from the newest."""
    steps: dict[Path, int] = {}
    for path in sorted(job.checkpoints.glob("*.ckpt")):
        try:
            steps[path] = load(path)["global_step"]
        except Exception as cause:  # every failure to load counts
            return replace(outcome, loaded=len(steps), error=f"{path.name}: {cause}")
    if not steps:
        return outcome
    newest = max(steps, key=lambda path: (steps[path], path.name))
    rest = Job(command_of(outcome.case, outcome.launcher, "--ckpt_path", str(newest.absolute())), job.folder, log)
    rest.wait(lambda: False, JOB_LIMIT_S)
    rest.end(LIMIT_S)
    if rest.main.returncode:
        error = f"resuming from {newest.name} ended with {rest.main.returncode}: {log}"
        return replace(outcome, loaded=len(steps), error=error)
    final = job.folder / "runs" / "gspo" / "version_1" / "checkpoints" / "last.ckpt"
    weights = load(final if steps[newest] < STEPS else newest)["state_dict"]  # after the last step nothing is written any more
    assert weights.keys() == whole.weights.keys()
    difference = max(float((weights[name] - value).abs().max()) for name, value in whole.weights.items())
    return replace(outcome, loaded=len(steps), step=steps[newest], difference=difference)


def markdown(outcomes: Sequence[Outcome]) -> str:
    """A table with a line for each way to write checkpoints and to start a job."""
    rows = []
    for case, launcher in dict.fromkeys((one.case, one.launcher) for one in outcomes):
        same = [one for one in outcomes if (one.case, one.launcher) == (case, launcher)]
        resumed = [one.difference for one in same if one.difference is not None]
        slowest = max((one.seconds for one in same if one.seconds is not None), default=None)
        counts = (len(same), sum(one.verdict == "right" for one in same), sum(one.writing for one in same), len(resumed))
        ends = [f"{max(resumed):.1e}" if resumed else "-", "-" if slowest is None else f"{slowest:.1f}"]
        rows.append([case, launcher, *map(str, counts), *ends])
    return table(HEADER, rows, left=2)


def run(options: argparse.Namespace) -> None:
    """Kill this many times; raises an error at the end if any result was wrong."""
    check_at_least(options, 1, "times")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    whole: dict[str, Undisturbed] = {}
    outcomes: list[Outcome] = []
    for number in range(options.times):
        case = list(CASES)[number % len(CASES)]
        if case not in whole:
            tell(f"{case}, undisturbed")
            whole[case] = undisturbed(case, options.out)
        one = kill_once(number, options, whole)
        outcomes.append(one)
        tell(f"{number + 1} of {options.times}: {one.case}, {one.launcher}, rank {one.rank}, {one.moment}: {one.verdict}")
        content = {**about(options), "times": [{**vars(one), "verdict": one.verdict} for one in outcomes]}
        (options.out / "kill_ranks.json").write_text(json.dumps(content, indent=1))
    print(markdown(outcomes))
    if wrong := sum(one.verdict != "right" for one in outcomes):
        raise BenchmarkError(f"{wrong} of {len(outcomes)} jobs did not go right")


main = entry(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
