"""Kills ranks of training jobs at random moments, and goes on from what is left: `python benchmarks/kill_ranks.py --times 20`.

Each time a job of two processes trains the embedded policy with a checkpoint after every step, and one process gets SIGKILL.
The job must end soon, with a message and a code other than 0; every checkpoint on the disk must load; and the newest must go on
to the weights of a job that nobody disturbed. The table is printed, and written to results/kill_ranks.md with what it means.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from commands import UsageError, check_at_least, tell
from kill_job import CASES, LAUNCHERS, ROOT, STEPS, Job, Moment
from kill_report import Outcome, markdown, said, table
from report import command_line, machine, versions
from torch import Tensor

from hybrid_lightning.sharding.checkpoints import WholeFiles

LIMIT_S = 60.0  # for all processes to end once one has been killed
JOB_LIMIT_S = 600.0  # for a job that nobody disturbs
REPORT = ROOT / "results" / "kill_ranks.md"


@dataclass(frozen=True)
class Undisturbed:
    """A job that ran to its end."""

    weights: dict[str, Tensor]
    first_write_s: float
    end_s: float


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="kill_ranks.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--times", type=int, default=20, help="how often (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of ranks and moments (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/kill_ranks"), help="folder of runs and logs (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def undisturbed(case: str, out: Path) -> Undisturbed:
    """Run a job to its end.

    Raises:
        RuntimeError: If it fails.
    """
    job = Job(CASES[case].command("the command"), out / "undisturbed" / case, out / f"undisturbed {case}.log")
    job.wait(job.checkpoints.exists, JOB_LIMIT_S)
    first_write_s = job.seconds
    job.wait(lambda: False, JOB_LIMIT_S)
    end_s = job.seconds
    job.end(LIMIT_S)
    if job.main.returncode:
        raise RuntimeError(f"{case}: a job that nobody disturbed ended with {job.main.returncode}; see {job.log}")
    return Undisturbed(load(job.checkpoints / "last.ckpt")["state_dict"], first_write_s, end_s)


def load(path: Path) -> dict[str, Any]:
    """All of a checkpoint."""
    return WholeFiles().load_checkpoint(path, weights_only=True)


def kill_once(number: int, arguments: argparse.Namespace, whole: dict[str, Undisturbed]) -> Outcome:
    """Start a job, kill a rank, look at what is left and go on from it."""
    generator = random.Random(f"{arguments.seed} {number}")
    case = list(CASES)[number % len(CASES)]
    launcher = list(LAUNCHERS)[number // len(CASES) % len(LAUNCHERS)]
    outcome = None
    while outcome is None:  # where the job was over before, another moment
        shutil.rmtree(arguments.out / f"{number:02d}", ignore_errors=True)
        job = Job(CASES[case].command(launcher), arguments.out / f"{number:02d}", arguments.out / f"{number:02d}.log")
        rank = generator.randrange(2)
        outcome = kill(job, case, launcher, rank, Moment.draw(generator, whole[case].first_write_s, whole[case].end_s))
    return resume(outcome, job, whole[case], arguments.out / f"{number:02d}_resumed.log")


def kill(job: Job, case: str, launcher: str, rank: int, moment: Moment) -> Outcome | None:
    """Kill a rank of a job that runs, and wait for its end; None if it had done all its work by then."""
    if not moment.wait(job, JOB_LIMIT_S) or not job.wait(lambda: job.rank(rank) is not None, JOB_LIMIT_S):
        job.end(LIMIT_S)
        return None
    process = job.rank(rank)
    assert process is not None, "it has just been there"
    alone = job.processes().keys() == {process}
    os.kill(process, signal.SIGKILL)
    writing = job.writes()
    seconds = job.end(LIMIT_S)
    code = job.main.returncode
    if code == 0 and load(job.checkpoints / "last.ckpt")["global_step"] == STEPS:
        return None
    return Outcome(case, launcher, rank, str(moment), alone, writing, seconds, code, said(job.log.read_text()))


def resume(outcome: Outcome, job: Job, whole: Undisturbed, log: Path) -> Outcome:
    """Load all that is left, and go on from the newest."""
    steps: dict[Path, int] = {}
    for path in sorted(job.checkpoints.glob("*.ckpt")):
        try:
            steps[path] = load(path)["global_step"]
        except Exception as error:  # any is what must not be
            return outcome.with_left(len(steps), f"{path.name}: {error}")
    if not steps:
        return outcome.with_left(0)
    newest = max(steps, key=lambda path: (steps[path], path.name))
    rest = Job(CASES[outcome.case].command(outcome.launcher, "--ckpt_path", str(newest.absolute())), job.folder, log)
    rest.wait(lambda: False, JOB_LIMIT_S)
    rest.end(LIMIT_S)
    if rest.main.returncode:
        return outcome.with_left(len(steps), f"going on from {newest.name} ended with {rest.main.returncode}: {log}")
    final = job.folder / "runs" / "gspo" / "version_1" / "checkpoints" / "last.ckpt"
    weights = load(final if steps[newest] < STEPS else newest)["state_dict"]  # after the last step nothing is written any more
    assert weights.keys() == whole.weights.keys()
    difference = max(float((weights[name] - value).abs().max()) for name, value in whole.weights.items())
    return outcome.with_left(len(steps), step=steps[newest], difference=difference)


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill so many times; 1 if anything was not as it must be."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
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
        outcomes.append(kill_once(number, options, whole))
        tell(f"{number + 1} of {options.times}: {outcomes[-1].verdict}")
    about = {"command": command_line(), "seed": options.seed, "machine": machine(), "versions": versions()}
    (options.out / "kill_ranks.json").write_text(json.dumps({**about, "times": [vars(one) for one in outcomes]}, indent=1))
    print(table(outcomes))
    REPORT.write_text(markdown(outcomes, about, LIMIT_S), encoding="utf-8")
    return int(any(one.verdict != "right" for one in outcomes))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UsageError as error:
        sys.exit(f"error: {error}")
