"""Worker: trains a case and measures its memory, or plans the case as `plan` would; writes the results as JSON.

Each rank writes its own results. Tensors are counted in one run and the process is measured in another, since counting also needs
memory.
"""

from hybrid_lightning.process import prepare_process

prepare_process()  # as `python -m hybrid_lightning` does

import json
import os
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from benchmarks.memory.cases import ROLLOUTS, SHARES, MemoryCase
from benchmarks.memory.probe import MemoryProbe
from benchmarks.training import GivenPrompts, build_policy, quiet_trainer
from benchmarks.workloads import Settings
from hybrid_lightning.adapters.budgets import ModuleBudget
from hybrid_lightning.callbacks import HybridAdapterSetup
from hybrid_lightning.losses import GRPOLoss
from hybrid_lightning.memory import DDP, FSDP2, RunSettings, Sharding, SingleDevice, TrainerFlags
from hybrid_lightning.memory.peaks import plan_method
from hybrid_lightning.model.loading import read_config, resolve_model
from hybrid_lightning.rollout.loader import RolloutSchedule
from hybrid_lightning.runner.backend import packs
from hybrid_lightning.sharding.fsdp2 import FSDP2Strategy

_STRATEGIES = {"ddp": DDPStrategy, "fsdp2": FSDP2Strategy}
_SHARDINGS: dict[str, type[Sharding]] = {"ddp": DDP, "fsdp2": FSDP2}


def adapter_of(case: MemoryCase) -> HybridAdapterSetup:
    """The adapter of a case."""
    kept = case.keep_start_weights
    return HybridAdapterSetup(ModuleBudget(SHARES[case.method]), rank=case.rank, alpha=2 * case.rank, keep_start_weights=kept)


def measure(case: MemoryCase, folder: Path, counted: bool) -> dict[str, Any]:
    """Train a few steps, after everything that a run does before its steps."""
    workload = replace(case.prepared, minibatches=case.minibatches)
    settings = Settings(workload, folder, case.device, torch.get_num_threads(), ROLLOUTS, seed=0)
    prompts = settings.prompts
    given = {"max_tokens_per_micro_batch": case.max_tokens, "gradient_checkpointing": case.checkpointing}
    policy = build_policy(settings, loss=GRPOLoss(kl_coef=case.kl_coef), eval_samples=case.samples, **given)
    policy.policy.pretrained.stop_ids = [10**9]  # no such token: nothing ends
    probe = MemoryProbe()
    with tempfile.TemporaryDirectory() as root:
        validation: dict[str, Any] = {"val_check_interval": ROLLOUTS * case.minibatches, "check_val_every_n_epoch": None}
        trainer = quiet_trainer(
            root,
            case.device,
            devices=2 if case.strategy else 1,
            strategy=_STRATEGIES[case.strategy](process_group_backend="gloo") if case.strategy else "auto",
            precision=case.precision,
            max_steps=ROLLOUTS * case.minibatches,
            gradient_clip_val=1.0,
            callbacks=[probe, adapter_of(case)],
            **({"num_sanity_val_steps": -1, "limit_val_batches": 1.0, **validation} if case.validates else {}),
        )
        with probe.measuring() if counted else nullcontext():
            trainer.fit(policy, datamodule=GivenPrompts(prompts, case.prompts))
    assert policy.plan is not None
    peak = max(moment["process"] for moment in probe.moments.values())
    return {"moments": probe.moments, "process": peak, "trainable": policy.plan.trainable_parameters()}


def plan(case: MemoryCase, folder: Path) -> dict[str, Any]:
    """Plan the same run."""
    flags = TrainerFlags(
        _SHARDINGS[case.strategy](2) if case.strategy else SingleDevice(),
        on_cpu=case.device == "cpu",
        precision=case.precision,
        device_bytes=None if case.device == "cpu" else torch.cuda.get_device_properties(0).total_memory,
    )
    settings = RunSettings(
        read_config(resolve_model(str(folder))),
        case.prompt_tokens,
        case.new_tokens,
        RolloutSchedule(case.prompts, case.samples, case.minibatches),
        adapter_of(case).planning,
        flags,
        dtype=getattr(torch, case.dtype),
        gradient_checkpointing=case.checkpointing,
        max_tokens_per_micro_batch=case.max_tokens,
        eval_prompts=case.prompts if case.validates else 0,
        eval_samples=case.samples,
        keep_start_weights=case.keep_start_weights,
    )
    found = plan_method(settings)
    seen = torch.bfloat16.itemsize * found.trainable if case.method == "FFT" and settings.product_dtype != torch.float32 else 0
    moments = {phase: {**asdict(peak), "total": peak.total} for phase, peak in found.peaks.items()}
    return {
        "moments": moments,
        "process": found.process_bytes,
        "trainable": found.trainable,
        # oneDNN's packed copies are not tensors; 16-bit copies of fully trained weights are.
        "unseen": {phase: max(0.0, peak.packed - seen) if packs(torch.float32) else 0.0 for phase, peak in found.peaks.items()},
    }


def main() -> None:
    """Argument: `{"case": {...}, "folder": path, "threads": N, "what": "tensors", "process" or "plan", "out": folder}`."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    case, folder = MemoryCase(**request["case"]), Path(request["folder"])
    result = plan(case, folder) if request["what"] == "plan" else measure(case, folder, counted=request["what"] == "tensors")
    (Path(request["out"]) / f"{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
