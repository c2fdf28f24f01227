"""Ranks, sizes of a rollout and learning rates of LoRA in RL: `python -m benchmarks.study.ranks`.

The task is *products* (`tasks/products.yaml`), which every rank can learn: what is looked for is what breaks. Every run takes the
same number of optimizer steps, two a rollout, so that one of 1,024 completions learns from 16 times the completions that one of
64 has. Runs are made one after the other, in one process; each is a line of `--out`, and what is there is not made again. Prints
the tables of all that is there.
"""

import argparse
import contextlib
import json
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from io import StringIO
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.commands import command, versions
from benchmarks.study.pool import HERE
from benchmarks.study.runner import QUIET, accuracies, arguments
from benchmarks.tables import table
from hybrid_lightning.cli import HybridLightningCLI
from hybrid_lightning.errors import TrainingError

TASK = HERE / "tasks" / "products.yaml"
RANK = 8  # of the shipped configs, at which all scalings are the same: 2
SCALINGS = {  # of B A, as alpha and whether it is divided by the root of the rank
    "2": lambda rank: (2.0 * rank, False),
    "rslora": lambda rank: (2 * math.sqrt(RANK), True),
    "16/rank": lambda rank: (2.0 * RANK, False),
}
CLIPS = {"GRPOLoss": (0.2, 0.2), "GSPOLoss": (3e-4, 4e-4)}  # of the shipped configs
SHARES = {"lora": 0.0, "hybrid": 0.1, "full": 1.0}
START = 0.357  # accuracy of the start policy on the test problems, results/README.md
FALL = 0.2


@dataclass(frozen=True)
class Cell:
    """What a run is of."""

    method: str
    rank: int
    scaling: str
    rate: float  # of LoRA, or of full fine-tuning; a hybrid's full modules have a tenth of it, as in the shipped configs
    completions: int  # of a rollout, 8 of each prompt
    loss: str
    steps: int
    seed: int

    @property
    def options(self) -> dict[str, Any]:
        (alpha, rslora), (low, high) = SCALINGS[self.scaling](self.rank), CLIPS[self.loss]
        return {
            **{"seed_everything": self.seed, "model.seed": self.seed, "model.loss": self.loss},
            **{"model.loss.clip_low": low, "model.loss.clip_high": high, "model.lr_lora": self.rate},
            **{"model.lr_full": float(f"{self.rate * (1 if self.method == 'full' else 0.1):.3g}")},
            **{"model.prompts_per_rollout": self.completions // 8, "trainer.max_steps": self.steps},
            **{"adapter.rank": self.rank, "adapter.alpha": alpha, "adapter.use_rslora": rslora},
            **{"adapter.budget.share": SHARES[self.method], "trainer.limit_val_batches": 0, "trainer.accelerator": "cpu"},
            **QUIET,
        }


class Rewards(Callback):
    """The mean reward of each rollout, and the entropy with which it was sampled."""

    def __init__(self) -> None:
        self.rewards: list[float] = []
        self.entropies: list[float] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.trainer, self.module = trainer, pl_module

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step % 2:  # the first of a rollout's two steps
            self.rewards.append(round(float(trainer.callback_metrics["reward"]), 4))
            self.entropies.append(round(float(trainer.callback_metrics["entropy"]), 4))


def run(cell: Cell, doctor: bool) -> dict[str, Any]:
    """Train and test."""
    start, seen, diverged = time.process_time(), Rewards(), False
    words = ["--config", str(TASK), *arguments(cell.options)]
    said = StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            HybridLightningCLI(args=["fit", *words], trainer_defaults={"callbacks": [seen]})
            seen.trainer.test(seen.module, datamodule=seen.trainer.datamodule, verbose=False)  # type: ignore[attr-defined]
        except TrainingError:  # of too large a learning rate: that is a result
            diverged = True
    tested = {"avg": 0.0, "greedy": 0.0} if diverged else accuracies(seen.trainer, "test")
    trained = sum(parameter.numel() for parameter in seen.module.parameters() if parameter.requires_grad)
    found = {**asdict(cell), "trained": trained, **tested, "diverged": diverged, "rewards": seen.rewards}
    found |= {"entropies": seen.entropies, "processor_seconds": round(time.process_time() - start, 1)}
    return found | ({"trial_kl": trial_kl(words)} if doctor else {})


def trial_kl(words: list[str]) -> float | None:
    """By how much the doctor's trial step changes the policy, in nats a token."""
    said = StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        HybridLightningCLI(args=["doctor", *words])
    number = re.search(r"KL (\S+) nats", said.getvalue())
    return float(number[1]) if number else None


def outcome(record: dict[str, Any]) -> str:
    """How a run ended, in a word.

    `collapsed`: at less than half of the start policy's accuracy, or with numbers that are not finite. `fell`: 20 points below the
    best that two rollouts in a row had on average. `learned`: all others.
    """
    if record["diverged"] or record["avg"] < START / 2:
        return "collapsed"
    best = max(map(fmean, pairwise(record["rewards"])), default=0.0)
    return "fell" if best - record["avg"] > FALL else "learned"


def tables(records: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """A table for each loss, method, scaling and rate: accuracy by rank and completions, and how many runs broke."""
    groups: dict[tuple[Any, ...], dict[tuple[int, int], list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        key = tuple(record[name] for name in ("loss", "steps", "method", "scaling"))
        groups[key][record["rank"], record["completions"], record["rate"]].append(record)
    for key, cells in sorted(groups.items()):
        ranks, sizes, rates = (sorted({cell[place] for cell in cells}) for place in range(3))
        header = ["rank", *(f"{size}, {rate:g}" for size in sizes for rate in rates)]
        rows = [[str(rank), *(text(cells.get((rank, size, rate), [])) for size in sizes for rate in rates)] for rank in ranks]
        yield ", ".join(map(str, key)), table(header, rows)


def text(runs: list[dict[str, Any]]) -> str:
    """Mean and standard deviation of accuracy in percent, and how many of the runs broke."""
    if not runs:
        return "-"
    accuracies = [100 * run["avg"] for run in runs]
    spread = f" ± {stdev(accuracies):.1f}" if len(runs) > 1 else ""
    broken = sum(outcome(run) != "learned" for run in runs)
    return f"{fmean(accuracies):.1f}{spread}" + (f" ({broken}/{len(runs)})" if broken else "")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def main() -> None:
    parser = command("study.ranks", __doc__)
    given: dict[str, tuple[Any, list[Any]]] = {
        **{"completions": (int, [256, 64, 1024]), "rank": (int, [1, 4, 16, 64, 128]), "rate": (float, [0.003, 0.01, 0.03])},
        **{"scaling": (str, ["2", "rslora"]), "method": (str, ["lora"]), "loss": (str, ["GRPOLoss"]), "seed": (int, [0])},
    }
    for name, (kind, default) in given.items():
        parser.add_argument(f"--{name}", type=kind, nargs="*", default=default, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps, two a rollout (default: %(default)s)")
    parser.add_argument("--doctor", action=argparse.BooleanOptionalAction, default=False, help="the doctor's trial step, too")
    parser.add_argument("--out", type=Path, default=Path("results/ranks.jsonl"), help="default: %(default)s")
    options = parser.parse_args()
    made = read(options.out)
    of_cell = list(Cell.__dataclass_fields__)
    there = {tuple(record[name] for name in of_cell) for record in made}
    values = (getattr(options, name) for name in ("seed", "completions", "rank", "rate", "scaling", "method", "loss"))
    for seed, completions, rank, rate, scaling, method, loss in product(*values):
        cell = Cell(method, rank, scaling, rate, completions, loss, options.steps, seed)
        if tuple(asdict(cell).values()) in there:
            continue
        record = {**run(cell, options.doctor), "commit": versions()["commit"]}
        made.append(record)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{cell} {record['avg']:.3f} {outcome(record)}, {record['processor_seconds']} s", flush=True)
    for title, content in tables(made):
        print(f"\n## {title}\n\n{content}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
