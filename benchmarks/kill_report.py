"""From killed jobs to the table and the page of `kill_ranks.py`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from commands import columns

TOLERANCE = 1e-5  # between weights, float32
# What says that a process is gone, and who says so. The first tells how to go on.
_MESSAGES = {
    "ours": r"rank \d (?:lost contact with another rank.*(?:--ckpt_path \S+|no checkpoint has been saved yet)|ends: rank 0)",
    "Lightning": r"Child process with PID \d+ terminated with code",
    "torchrun": r"Signal 9 \(SIGKILL\) received by PID|exitcode\s*: -9",
}
HEADER = ["", "checkpoints", "started by", "rank", "killed at", "in a write", "ended after", "code", "message of", "loaded"]
HEADER += ["went on from", "weights differ by", ""]


@dataclass(frozen=True)
class Outcome:
    """What became of a job."""

    case: str
    launcher: str
    rank: int
    moment: str
    alone: bool  # whether no other process was left that could say anything
    writing: bool  # whether a half-written or half-removed checkpoint lay there just after the kill
    seconds: float | None  # until nothing of it lived; None if that took too long
    code: int
    messages: tuple[str, ...]
    loaded: int = 0  # checkpoints that were there, all of which loaded unless there is an error
    step: int | None = None  # of the newest
    difference: float | None = None  # of the final weights, from those of an undisturbed job
    error: str = ""

    def with_left(self, loaded: int, error: str = "", step: int | None = None, difference: float | None = None) -> "Outcome":
        """The same with what was found on the disk."""
        return replace(self, loaded=loaded, error=error, step=step, difference=difference)

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


def said(log: str) -> tuple[str, ...]:
    """Who says in a log that a process is gone."""
    return tuple(name for name, pattern in _MESSAGES.items() if re.search(pattern, log))


def row(number: int, outcome: Outcome) -> list[str]:
    """One line of the table."""
    left = "none was there" if outcome.step is None else f"step {outcome.step}"
    return [
        str(number),
        outcome.case,
        outcome.launcher,
        str(outcome.rank),
        outcome.moment,
        "yes" if outcome.writing else "no",
        "-" if outcome.seconds is None else f"{outcome.seconds:.1f} s",
        str(outcome.code),
        ", ".join(outcome.messages) or ("no other was left" if outcome.alone else "nobody"),
        str(outcome.loaded),
        left,
        "-" if outcome.difference is None else f"{outcome.difference:.1e}",
        outcome.verdict,
    ]


def table(outcomes: Sequence[Outcome]) -> str:
    """All jobs, as text."""
    return columns([HEADER, *(row(number, one) for number, one in enumerate(outcomes, start=1))])


def markdown(outcomes: Sequence[Outcome], about: dict[str, Any], limit_s: float) -> str:
    """The page: how many went right, all jobs, and what the columns mean."""
    right = sum(one.verdict == "right" for one in outcomes)
    resumed = sum(one.difference is not None for one in outcomes)
    writing = sum(one.writing for one in outcomes)
    slowest = max((one.seconds for one in outcomes if one.seconds is not None), default=0.0)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if name in ("torch", "lightning"))
    rows = [HEADER, ["---"] * len(HEADER), *(row(number, one) for number, one in enumerate(outcomes, start=1))]
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    machine = about["machine"]
    return f"""# Ranks that are killed

    {about["command"]}

{right} of {len(outcomes)} jobs went right. {writing} were killed while a checkpoint was written or removed; all processes were
gone {slowest:.1f} s after the kill at the latest; {resumed} went on from their newest checkpoint, and the others had none yet.

{lines}

Each job trains the embedded policy by `configs/gspo.yaml` with smaller sizes on two processes, 16 optimizer steps, a
checkpoint after each (the two newest are kept, and `last.ckpt`), and one process gets SIGKILL. A job goes right if

- all of its processes are gone within {limit_s:.0f} s, with a code other than 0 and a message that says that one is gone:
  `ours` also names the checkpoint to go on from, unless Lightning or torchrun ended the process before it noticed. A
  command that is killed before it has started others leaves nobody to say so;
- every checkpoint on the disk loads whole;
- the newest, resumed by the same command with `--ckpt_path`, ends with weights within {TOLERANCE:.0e} of those of a job
  that nobody disturbed.

`killed at` is the time since the start of the job, of which importing and scoring take most, or the number of a write and the
time since it had begun; `in a write` tells whether something half-written or half-removed lay on the disk just after the
kill. `code` is that of the process that was started first, -9 where it was killed itself.

On {machine["processor"]}, {machine["cores"]} cores; {versions}; commit {about["versions"]["commit"]}; seed {about["seed"]} of
ranks and moments.
"""
