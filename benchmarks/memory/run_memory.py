"""Worker: trains a case and measures what that holds, or plans the same as `plan` would; writes what it finds as JSON.

Of several ranks each writes its own. Tensors are counted in one run and the process is looked at in another, since counting takes
memory, too.
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
from benchmarks.processes import resident_bytes
from benchmarks.training import GivenPrompts, build_policy, quiet_trainer
from benchmarks.workloads import Settings
from hybrid_lightning.adapters.budgets import ModuleBudget
from hybrid_lightning.adapters.lora_settings import LoraSettings
from hybrid_lightning.callbacks import HybridAdapterSetup
from hybrid_lightning.engine.backend import packs
from hybrid_lightning.losses import GRPOLoss
from hybrid_lightning.memory import DDP, FSDP2, RunSettings, Sharding, SingleDevice
from hybrid_lightning.memory.peaks import plan_method
from hybrid_lightning.model.loading import read_config, resolve_model
from hybrid_lightning.sharding.fsdp2 import FSDP2Strategy

_STRATEGIES = {"ddp": DDPStrategy, "fsdp2": FSDP2Strategy}
_SHARDINGS: dict[str, type[Sharding]] = {"ddp": DDP, "fsdp2": FSDP2}


def measure(case: MemoryCase, folder: Path, counted: bool) -> dict[str, Any]:
    """Train a few steps, with everything that a run does before them."""
    workload = replace(case.prepared, minibatches=case.minibatches)
    settings = Settings(workload, folder, case.device, torch.get_num_threads(), ROLLOUTS, seed=0)
    prompts, before = settings.prompts, resident_bytes()[0]
    given = {"max_tokens_per_micro_batch": case.max_tokens, "gradient_checkpointing": case.checkpointing}
    policy = build_policy(settings, loss=GRPOLoss(kl_coef=case.kl_coef), eval_samples=case.samples, **given)
    policy.policy.pretrained.stop_ids = [10**9]  # no such token: nothing ends
    probe = MemoryProbe()
    budget = ModuleBudget(SHARES[case.method])
    adapter = HybridAdapterSetup(budget=budget, rank=case.rank, alpha=2 * case.rank, keep_start_weights=case.keep_start_weights)
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
            callbacks=[probe, adapter],
            **({"num_sanity_val_steps": -1, "limit_val_batches": 1.0, **validation} if case.validates else {}),
        )
        with probe.measuring() if counted else nullcontext():
            trainer.fit(policy, datamodule=GivenPrompts(prompts, case.prompts))
    assert policy.plan is not None
    peak = max(moment["process"] for moment in probe.moments.values())
    trainable = policy.plan.trainable_parameters()
    return {"moments": probe.moments, "before": before, "growth": peak - before, "trainable": trainable}


def plan(case: MemoryCase, folder: Path) -> dict[str, Any]:
    """The same run, planned."""
    share = SHARES[case.method]
    settings = RunSettings(
        config=read_config(resolve_model(str(folder))),
        prompt_tokens=case.prompt_tokens,
        completion_tokens=case.new_tokens,
        prompts_per_rollout=case.prompts,
        samples_per_prompt=case.samples,
        micro_batches=case.minibatches,
        eval_prompts=case.prompts if case.validates else 0,
        eval_samples=case.samples,
        dtype=getattr(torch, case.dtype),
        mixed_precision=case.precision == "bf16-mixed",
        max_tokens_per_micro_batch=case.max_tokens,
        gradient_checkpointing=case.checkpointing,
        budget=ModuleBudget(share),
        lora=LoraSettings(case.rank, 2 * case.rank),
        keep_start_weights=case.keep_start_weights,
        on_cpu=case.device == "cpu",
        device_bytes=None if case.device == "cpu" else torch.cuda.get_device_properties(0).total_memory,
    )
    sharding = _SHARDINGS[case.strategy](2) if case.strategy else SingleDevice()
    found = plan_method(settings, sharding)
    moments = {phase: {**asdict(peak), "total": peak.total} for phase, peak in found.peaks.items()}
    growth = {} if found.growth is None else {"growth": found.growth_bytes, "in the process": asdict(found.growth)}
    return {
        "moments": moments,
        **growth,
        "trainable": found.trainable,
        "in tensors": not packs(torch.float32),  # whether what products read, `packed`, is in tensors
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
