"""What a few steps of training change in each module, and the spectra of that: `python -m benchmarks.study.updates`.

By full fine-tuning at its tuned rate (`fft`), and in cheaper ways: by LoRA of a larger rank at that of LoRA (`lora_r8`,
`lora_r16`), and without changing a weight, by the sum of the steps that Adam would take (`adam`), and by the sum of the gradients
of the steps over the root of the sum of their squares (`moments`), or of its approximation of rank one (`moments_rank1`). The
schedule is that of a whole run of the task.
"""

import argparse
import contextlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from benchmarks.study.methods import METHODS
from benchmarks.study.pool import tasks_of, work_side_by_side
from benchmarks.study.runner import QUIET, arguments, commit
from benchmarks.study.store import add_options, store_of, write
from benchmarks.study.tuning import best_rate
from hybrid_lightning.adapters.lora_settings import ADAPTER
from hybrid_lightning.adapters.spectra import squared_singular_values
from hybrid_lightning.adapters.statistics import preconditioner

STEPS = (1, 2, 4, 8, 16, 32)
RANKS = (0, 1, 2, 4, 8, 16)  # beyond which the tail is kept
NO_RATE = 1e-30  # at which no float32 weight changes
WAYS: dict[str, dict[str, Any]] = {
    "fft": {"adapter.budget.share": 1.0},
    "lora_r8": {"adapter.budget.share": 0.0, "adapter.rank": 8, "adapter.alpha": 16},
    "lora_r16": {"adapter.budget.share": 0.0, "adapter.rank": 16, "adapter.alpha": 32},
    **{name: {"adapter.budget.share": 1.0} for name in ("adam", "moments", "moments_rank1")},
}
UNMOVED = ("adam", "moments", "moments_rank1")


@dataclass(frozen=True)
class Updates:
    """One short run that is to be made."""

    task: str  # path of its config
    way: str
    learning_rate: float
    seed: int

    @property
    def file(self) -> str:
        """Name of its record."""
        return f"updates/{Path(self.task).stem}/{self.way}/seed={self.seed}.json"


class Spectra(Callback):
    """Notes the spectrum of every candidate's change after some optimizer steps, and ends the run after the last of them."""

    def __init__(self, way: str) -> None:
        self.way = way
        self.tails: dict[int, dict[str, list[float]]] = {}
        self.spectra: dict[str, list[float]] = {}
        self._sums: dict[str, Tensor] = {}  # of steps, or of gradients
        self._squares: dict[str, Tensor] = {}  # sums of the squares of gradients
        self._seen = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self._seen:  # a micro-batch within an optimizer step
            return
        self._seen = step
        if self.way == "adam":
            self._add_directions(trainer, pl_module)
        if step not in STEPS:
            return
        spectra = {name: squared_singular_values(change) for name, change in self._changes(pl_module).items()}
        self.tails[step] = {name: [_short(float(values[rank:].sum())) for rank in RANKS] for name, values in spectra.items()}
        if step == STEPS[-1]:
            self.spectra = {name: [_short(value) for value in values.tolist()] for name, values in spectra.items()}
            trainer.should_stop = True

    def _changes(self, pl_module: Any) -> dict[str, Tensor]:
        if self.way == "adam":
            return self._sums
        if self.way == "moments":
            return {name: total * self._squares[name].rsqrt().nan_to_num(posinf=0.0) for name, total in self._sums.items()}
        if self.way == "moments_rank1":
            return {name: _preconditioned(total.double(), self._squares[name].double()) for name, total in self._sums.items()}
        modules = dict(pl_module.model.get_base_model().named_modules())
        return {module.name: _change(modules[module.name]) for module in pl_module.plan.candidates}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        if not self.way.startswith("moments"):
            return
        modules = dict(pl_module.model.get_base_model().named_modules())
        for name in pl_module.plan.full_modules:
            gradient = modules[name].modules_to_save[ADAPTER].weight.grad
            self._sums[name] = self._sums.get(name, 0) + gradient
            self._squares[name] = self._squares.get(name, 0) + gradient.square()

    def _add_directions(self, trainer: Trainer, pl_module: Any) -> None:
        (optimizer,) = trainer.optimizers
        (first, second), eps = optimizer.param_groups[0]["betas"], optimizer.param_groups[0]["eps"]
        modules = dict(pl_module.model.get_base_model().named_modules())
        for name in pl_module.plan.full_modules:
            state = optimizer.state[modules[name].modules_to_save[ADAPTER].weight]
            count = float(state["step"])
            mean, square = state["exp_avg"] / (1 - first**count), state["exp_avg_sq"] / (1 - second**count)
            self._sums[name] = self._sums.get(name, 0) + mean / (square.sqrt() + eps)


def _preconditioned(total: Tensor, squares: Tensor) -> Tensor:
    rows, columns = preconditioner(squares.mean(1), squares.mean(0))
    return rows[:, None] * total * columns


def _change(module: nn.Module) -> Tensor:
    """W now less W at the start."""
    with torch.no_grad():
        if hasattr(module, "modules_to_save"):
            return module.modules_to_save[ADAPTER].weight - module.original_module.weight  # type: ignore[index, union-attr, operator]
        low, up = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight  # type: ignore[index, union-attr]
        return module.scaling[ADAPTER] * (up.double() @ low.double())  # type: ignore[index, operator]


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def make(updates: Updates, folder: Path) -> str:
    """Train for a few steps and write the record."""
    from hybrid_lightning.cli import HybridLightningCLI

    torch.set_num_threads(1)
    rate = NO_RATE if updates.way in UNMOVED else updates.learning_rate
    options = {
        **WAYS[updates.way],
        "model.lr_full": rate,
        "model.lr_lora": rate,
        "seed_everything": updates.seed,
        "model.seed": updates.seed,
        "trainer.limit_val_batches": 0,
    }
    spectra = Spectra(updates.way)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        cli = HybridLightningCLI(
            args=["fit", "--config", updates.task, *arguments({**options, **QUIET})], trainer_defaults={"callbacks": [spectra]}
        )
    content = {
        "task": updates.task,
        "options": options,
        "commit": commit(),
        "model_digest": cli.model.plan.model_digest[:16],
        "ranks": RANKS,
        "tails": {str(step): tails for step, tails in spectra.tails.items()},
        "spectra": spectra.spectra if updates.way == "fft" else {},  # by which ranks are chosen
    }
    write(content, folder / updates.file)
    return f"{Path(updates.task).stem} {updates.way} seed={updates.seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--task", nargs="+", default=["facts", "facts_deep", "products_direct"], help="default: %(default)s")
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2000, 2001], help="never those of runs; default: %(default)s")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    add_options(parser)
    given = parser.parse_args()
    store = store_of(given)
    works = [
        Updates(task, way, best_rate(store, task, METHODS["lora" if way.startswith("lora") else "fft"]), seed)
        for seed in given.seeds
        for task in tasks_of(given)
        for way in given.way
    ]
    raise SystemExit(work_side_by_side(make, works, store, given.workers))


if __name__ == "__main__":
    main()
