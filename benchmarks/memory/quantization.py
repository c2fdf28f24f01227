"""Measures the memory of a run with the base and the optimizer state in fewer bits: `python -m benchmarks.memory.quantization`.

Each case runs the `fit` command in its own process, with one more callback. The table is printed, and written as JSON.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.commands import ROOT, command, entry, environment, run_logged, tell
from benchmarks.processes import forget_peak, resident_bytes
from benchmarks.tables import table
from benchmarks.training import gradient_bytes, optimizer_bytes, tensor_bytes

CONFIG = ROOT / "configs" / "smollm2_addition.yaml"
_NF4 = "--model.quantization=NF4"
_ADAM8, _PAGED = (f"--model.optimizer=bitsandbytes.optim.{name}" for name in ("AdamW8bit", "PagedAdamW8bit"))
CASES = {
    "bfloat16, AdamW": [],
    "NF4, AdamW": [_NF4],
    "NF4, AdamW8bit": [_NF4, _ADAM8],
    "NF4, PagedAdamW8bit": [_NF4, _PAGED],
}
_SMALL = ["--trainer.max_steps=2", "--trainer.num_sanity_val_steps=0", "--trainer.limit_val_batches=0", "--trainer.logger=false"]
_SIZES = ["--model.prompts_per_rollout=4", "--adapter.calibration_prompts=4", "--trainer.enable_progress_bar=false"]


class MemoryReport(Callback):
    """Writes the bytes that training holds, and the peak of the process, as JSON."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.bytes: dict[str, int] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restart the peak, now that loading, scoring and quantizing are done."""
        self.bytes["peak of loading and scoring"] = resident_bytes()[1]
        forget_peak()
        self.bytes["process at start"] = resident_bytes()[0]
        self.bytes["frozen weights"] = tensor_bytes(frozen_tensors(pl_module))
        self.bytes["trained weights"] = tensor_bytes([value for value in pl_module.parameters() if value.requires_grad])

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.bytes["gradients"] = gradient_bytes(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.bytes["optimizer state"] = optimizer_bytes(trainer.optimizers)
        self.bytes["peak of training"] = resident_bytes()[1]
        Path(self.path).write_text(json.dumps(self.bytes))


def frozen_tensors(module: nn.Module) -> list[Tensor]:
    """Frozen parameters, buffers, and the scales that bitsandbytes keeps for 4-bit weights."""
    tensors = [value for value in module.parameters() if not value.requires_grad] + list(module.buffers())
    for part in module.modules():
        state: Any = getattr(part, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return tensors


def measure(options: list[str], out: Path, name: str, threads: int) -> dict[str, int]:
    path = out / f"{name}.json"
    callback = {"class_path": "benchmarks.memory.quantization.MemoryReport", "init_args": {"path": str(path.absolute())}}
    asked = ["-m", "hybrid_lightning", "fit", "--config", str(CONFIG), *_SMALL, *_SIZES, *options]
    asked += [f"--trainer.callbacks={json.dumps([callback])}", f"--trainer.default_root_dir={out / 'runs'}"]
    # glibc then returns freed memory immediately
    run_logged(asked, out / f"{name}.log", {**environment(threads), "MALLOC_MMAP_THRESHOLD_": "100000"})
    result: dict[str, int] = json.loads(path.read_text())
    return result


def build_parser() -> argparse.ArgumentParser:
    return command("memory.quantization", __doc__, threads=1, out=Path("runs/quantization"))


def run(arguments: argparse.Namespace) -> None:
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, int]] = {}
    for number, (name, options) in enumerate(CASES.items()):
        tell(name)
        results[name] = measure(options, out, f"case{number}", arguments.threads)
    (out / "quantization.json").write_text(json.dumps({"torch": torch.__version__, "bytes": results}, indent=1))
    names = list(next(iter(results.values())))
    print(table(["MB", *results], [[row, *(f"{case[row] / 1e6:.1f}" for case in results.values())] for row in names]))


main = entry(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
