"""LoRA's rank, the size of a rollout and the learning rate in RL: `python -m benchmarks.study.ranks`.

The task is *products* (`tasks/products.yaml`), which every rank can learn: the question is which settings break. All runs
take the same number of optimizer steps, two per rollout, so with 1,024 completions per rollout they learn from 16 times as much
as with 64. They run one after the other in one process. Each is a line of `--out`, and is not repeated. Prints the tables of
results/ranks.md from the lines in `--out`.
"""

import contextlib
import json
import math
import re
import time
from collections.abc import Callable, Sequence
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
from hybrid_lightning.cli.main import HybridLightningCLI
from hybrid_lightning.errors import TrainingError

TASK, OUT = HERE / "tasks" / "products.yaml", Path("results/ranks.jsonl")
RANK = 8  # of the shipped configs, at which all scalings are the same, 2
SCALINGS = {"2": "alpha=2r", "rslora": "rsLoRA", "16/rank": "alpha=16"}
CLIPS = {"GRPOLoss": (0.2, 0.2), "GSPOLoss": (3e-4, 4e-4)}  # of the shipped configs
SHARES = {"lora": 0.0, "hybrid": 0.1, "full": 1.0}
START = 0.357  # accuracy of the start policy on the test problems, results/README.md
FALL = 0.2
Runs = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Cell:
    """The settings of a run."""

    method: str
    rank: int
    scaling: str
    rate: float  # of LoRA, or of full fine-tuning; a hybrid's full modules have a tenth of it, as in the shipped configs
    completions: int  # of a rollout, 8 of each prompt
    loss: str
    steps: int
    seed: int

    @property
    def words(self) -> list[str]:
        """The command-line options of a run."""
        alpha = {"2": 2.0 * self.rank, "rslora": 2 * math.sqrt(RANK), "16/rank": 2.0 * RANK}[self.scaling]
        low, high = CLIPS[self.loss]
        full = self.rate if self.method == "full" else float(f"{self.rate / 10:.3g}")
        options = {
            **{"seed_everything": self.seed, "model.seed": self.seed, "model.lr_lora": self.rate, "model.lr_full": full},
            **{"model.loss": self.loss, "model.loss.clip_low": low, "model.loss.clip_high": high},
            **{"model.prompts_per_rollout": self.completions // 8, "trainer.max_steps": self.steps},
            **{"adapter.rank": self.rank, "adapter.alpha": alpha, "adapter.use_rslora": self.scaling == "rslora"},
            **{"adapter.budget.share": SHARES[self.method], "trainer.limit_val_batches": 0, "trainer.accelerator": "cpu"},
        }
        return ["--config", str(TASK), *arguments(options | QUIET)]


class Rewards(Callback):
    """The mean reward and the sampling entropy of each rollout."""

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
    """Train and test, and let the doctor take its trial step."""
    start, seen, tested, said = time.process_time(), Rewards(), {"avg": 0.0, "greedy": 0.0}, StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            HybridLightningCLI(args=["fit", *cell.words], trainer_defaults={"callbacks": [seen]})
            seen.trainer.test(seen.module, datamodule=seen.trainer.datamodule, verbose=False)  # type: ignore[attr-defined]
            tested, diverged = accuracies(seen.trainer, "test"), False
        except TrainingError:  # of too large a learning rate: that is a result
            diverged = True
        trained = sum(parameter.numel() for parameter in seen.module.parameters() if parameter.requires_grad)
        found = {**asdict(cell), "trained": trained, **tested, "diverged": diverged, "rewards": seen.rewards}
        found |= {"entropies": seen.entropies, "processor_seconds": round(time.process_time() - start, 1)}
        if doctor:
            with contextlib.suppress(SystemExit):
                HybridLightningCLI(args=["doctor", *cell.words])
            found["trial_kl"] = float(re.findall(r"KL (\S+) nats", said.getvalue())[-1])
    return found | {"commit": versions()["commit"]}


def outcome(run: dict[str, Any]) -> str:
    """How a run ended.

    `collapsed`: at less than half of the start policy's accuracy, or with numbers that are not finite. `fell`: 20 points below
    the best that two rollouts in a row had on average. `learned`: all others.
    """
    if run["diverged"] or run["avg"] < START / 2:
        return "collapsed"
    best = max(map(fmean, pairwise(run["rewards"])), default=0.0)
    return "fell" if best - run["avg"] > FALL else "learned"


def tables(runs: Runs) -> dict[str, str]:
    """Tables by title: accuracy by rank, rate and completions for each loss, method and scaling; the trial step by scaling."""
    found = {}
    for loss, method, scaling in dict.fromkeys((run["loss"], run["method"], run["scaling"]) for run in runs):
        these = [run for run in runs if (run["loss"], run["method"], run["scaling"]) == (loss, method, scaling)]
        found[f"{loss}, {method}, {SCALINGS[scaling]}"] = by_rank(these, ("rate", "completions"), accuracy)
    tried = [run for run in runs if "trial_kl" in run]
    return found | {"trial step": by_rank(tried, ("scaling", "rate"), lambda one: f"{one[0]['trial_kl']:.2g}{marks(one)}")}


def by_rank(runs: Runs, columns: tuple[str, str], text: Callable[[Runs], str]) -> str:
    """A table with a row for each rank, and a column for each pair of values of these two for which not all runs collapsed."""
    pairs = sorted({tuple(run[name] for name in columns) for run in runs if outcome(run) != "collapsed"})
    rows = []
    for rank in sorted({run["rank"] for run in runs}):
        cells = [[run for run in runs if (run["rank"], *(run[name] for name in columns)) == (rank, *pair)] for pair in pairs]
        rows.append([str(rank), *(text(cell) if cell else "-" for cell in cells)])
    return table(["rank", *(", ".join(SCALINGS.get(value, str(value)) for value in pair) for pair in pairs)], rows)


def accuracy(runs: Runs) -> str:
    """Mean and standard deviation in percent, and the runs that broke; only the latter if all runs collapsed."""
    values, broke = [100 * run["avg"] for run in runs], marks(runs)
    spread = f"±{stdev(values):.1f}" if len(values) > 1 else ""
    return broke if broke == "c" * len(runs) else f"{fmean(values):.1f}{spread}{broke}"


def marks(runs: Runs) -> str:
    """A letter for each run that collapsed (c) or fell (f)."""
    return "".join(sorted(outcome(run)[0] for run in runs)).rstrip("l")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def main() -> None:
    parser = command("study.ranks", __doc__)
    lists: dict[str, list[Any]] = {
        **{"seed": [0], "completions": [64, 256, 1024], "rank": [1, 4, 16, 64, 128], "rate": [0.001, 0.003, 0.01]},
        **{"scaling": ["2", "rslora"], "method": ["lora"], "loss": ["GRPOLoss"]},
    }
    for name, default in lists.items():
        parser.add_argument(f"--{name}", type=type(default[0]), nargs="*", default=default, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--doctor", action="store_true", help="note what the doctor's trial step changes, too")
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    given = parser.parse_args()
    made = read(given.out)
    there = {tuple(run[name] for name in Cell.__dataclass_fields__) for run in made}
    for values in product(*(getattr(given, name) for name in lists)):
        cell = Cell(**dict(zip(lists, values, strict=True)), steps=given.steps)
        if tuple(asdict(cell).values()) not in there:
            made.append(run(cell, given.doctor))
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(made[-1]) + "\n")
            print(f"{cell}: {made[-1]['avg']:.3f}, {outcome(made[-1])}", flush=True)
    for title, content in tables(made).items():
        print(f"\n## {title}\n\n{content}")


if __name__ == "__main__":
    main()
