"""Measures the memory of a run with the base and the optimizer state in fewer bits: `python benchmarks/quantization.py`.

Each case is the `fit` command in a process of its own, with one callback more; the table is printed, and written as JSON.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from commands import columns, tell
from lightning.pytorch import Callback, LightningModule, Trainer
from run_methods import tensor_bytes
from torch import Tensor, nn
from torch.optim import Optimizer
from worker import host_memory

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "smollm2_addition.yaml"
_NF4, _INT8 = "--model.quantization=NF4", "--model.quantization=Int8"
_ADAM8, _PAGED = (f"--model.optimizer=bitsandbytes.optim.{name}" for name in ("AdamW8bit", "PagedAdamW8bit"))
CASES = {
    "bfloat16, AdamW": [],
    "Int8, AdamW": [_INT8],
    "NF4, AdamW": [_NF4],
    "NF4, AdamW8bit": [_NF4, _ADAM8],
    "NF4, PagedAdamW8bit": [_NF4, _PAGED],
}
_SMALL = ["--trainer.max_steps=2", "--trainer.num_sanity_val_steps=0", "--trainer.limit_val_batches=0", "--trainer.logger=false"]
_SIZES = ["--model.prompts_per_rollout=4", "--adapter.calibration_prompts=4", "--trainer.enable_progress_bar=false"]


class MemoryReport(Callback):
    """Writes the bytes of what training holds, and the peak of the process, as JSON.

    Args:
        path: File to write.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.bytes: dict[str, int] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Loading, scoring and quantizing are over: the peak of what follows is another."""
        self.bytes["peak of loading and scoring"] = host_memory()["cpu_peak"]
        clear = Path("/proc/self/clear_refs")
        if clear.exists():
            clear.write_text("5")  # the peak is counted from here
        self.bytes["process at start"] = host_memory()["cpu"]
        self.bytes["frozen weights"] = tensor_bytes(frozen_tensors(pl_module))
        self.bytes["trained weights"] = tensor_bytes([value for value in pl_module.parameters() if value.requires_grad])

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Here the gradients are complete."""
        self.bytes["gradients"] = tensor_bytes([value.grad for value in pl_module.parameters() if value.grad is not None])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All has been there."""
        values = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        self.bytes["optimizer state"] = tensor_bytes([value for value in values if isinstance(value, Tensor)])
        self.bytes["peak of training"] = host_memory()["cpu_peak"]
        Path(self.path).write_text(json.dumps(self.bytes))


def frozen_tensors(module: nn.Module) -> list[Tensor]:
    """Frozen parameters, buffers, and the scales that bitsandbytes keeps beside 4-bit weights."""
    tensors = [value for value in module.parameters() if not value.requires_grad] + list(module.buffers())
    for part in module.modules():
        state: Any = getattr(part, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return tensors


def measure(options: list[str], out: Path, name: str) -> dict[str, int]:
    """Run one case.

    Raises:
        RuntimeError: If the run fails; its output is in the log.
    """
    path, log = out / f"{name}.json", out / f"{name}.log"
    callback = {"class_path": "quantization.MemoryReport", "init_args": {"path": str(path.absolute())}}
    command = [sys.executable, "-m", "hybrid_lightning", "fit", "--config", str(CONFIG), *_SMALL, *_SIZES, *options]
    command += [f"--trainer.callbacks={json.dumps([callback])}", f"--trainer.default_root_dir={out / 'runs'}"]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "MALLOC_MMAP_THRESHOLD_": "100000",  # glibc gives what is freed back at once, and does not keep it for later
    }
    with log.open("w") as file:
        code = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise RuntimeError(f"{name} ended with {code}; see {log}")
    result: dict[str, int] = json.loads(path.read_text())
    return result


def main() -> None:
    """Measure all cases; the only argument is the folder of results."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quantization")
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, int]] = {}
    for number, (name, options) in enumerate(CASES.items()):
        tell(name)
        results[name] = measure(options, out, f"case{number}")
    (out / "quantization.json").write_text(json.dumps({"torch": torch.__version__, "bytes": results}, indent=1))
    names = list(next(iter(results.values())))
    print(columns([["MB", *results], *([row, *(f"{case[row] / 1e6:.1f}" for case in results.values())] for row in names)]))


if __name__ == "__main__":
    main()
