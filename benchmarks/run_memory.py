"""Worker: trains by one method, measures what that holds, plans the same as `plan` would, and prints both as JSON."""

import json
import sys
import tempfile
from dataclasses import asdict
from typing import Any

import torch
from lightning import LightningDataModule
from memory_probe import MemoryProbe
from reward import hashed_reward
from torch.utils.data import DataLoader
from workloads import Workload

from hybrid_lightning.adapters.budgets import ModuleBudget
from hybrid_lightning.adapters.lora import LoraSettings
from hybrid_lightning.callbacks import HybridAdapterSetup
from hybrid_lightning.losses import GRPOLoss
from hybrid_lightning.memory import RunSettings, SingleDevice, plan_memory
from hybrid_lightning.memory.from_config import load_config
from hybrid_lightning.memory.process import START
from hybrid_lightning.policy.module import PolicyModule
from hybrid_lightning.rewards import RewardFunction
from hybrid_lightning.rollout.sampler import Sampler
from hybrid_lightning.trainer import Trainer
from hybrid_lightning.types import Prompt

SHARES = {"FFT": 1.0, "LoRA": 0.0, "hybrid 10%": 0.1}
STEPS = 3


class HashedReward(RewardFunction):
    """Every completion earns something else, so that every row is updated."""

    measures_correctness = False

    def __call__(self, completions: Any, prompts: Any) -> list[float]:
        """Args: texts of the completions, and the prompt of each."""
        return [value + 1e-3 * index for index, value in enumerate(hashed_reward(completions))]


class Prompts(LightningDataModule):
    """The same prompts for training and validation."""

    def __init__(self, texts: list[str], validated: int) -> None:
        super().__init__()
        self.train_prompts = [Prompt(text=text, index=index) for index, text in enumerate(texts)]
        self.validated = validated

    def train_dataloader(self) -> Any:
        """Rollouts."""
        assert self.trainer is not None
        return self.trainer.lightning_module.rollout_loader(self.train_prompts)

    def val_dataloader(self) -> Any:
        """One batch."""
        return DataLoader(self.train_prompts[: self.validated], batch_size=self.validated, collate_fn=list)  # type: ignore[arg-type]


def measure(workload: Workload, folder: str, method: str) -> dict[str, Any]:
    """Train a few steps, with everything that a run does before them."""
    with open(f"{folder}/prompts.json", encoding="utf-8") as file:
        prompts: list[str] = json.load(file)
    mixed = workload.dtype == "bfloat16"
    policy = PolicyModule(
        loss=GRPOLoss(),
        reward=HashedReward(),
        model=folder,
        dtype=workload.dtype,
        sampler=Sampler(max_new_tokens=workload.max_new_tokens),
        prompts_per_rollout=workload.prompts,
        samples_per_prompt=workload.samples,
        minibatches_per_rollout=workload.minibatches,
        eval_samples=workload.samples,
    )
    probe = MemoryProbe()
    adapter = HybridAdapterSetup(budget=ModuleBudget(SHARES[method]), rank=workload.rank, alpha=workload.alpha)
    with tempfile.TemporaryDirectory() as root:
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            precision="bf16-mixed" if mixed else "32-true",
            max_steps=STEPS,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=-1,
            val_check_interval=STEPS,
            check_val_every_n_epoch=None,
            default_root_dir=root,
            callbacks=[probe, adapter],
        )
        with probe.measuring():
            trainer.fit(policy, datamodule=Prompts(prompts, workload.prompts))
    assert policy.plan is not None
    lengths = {len(policy.encode(Prompt(text=text))) for text in prompts}
    return {
        "measured": probe.moments,
        "process": max(moment["process"] for moment in probe.moments.values()),
        "imported": probe.imported,
        "trainable": policy.plan.trainable_parameters(),
        "prompt_tokens": max(lengths),
    }


def plan(workload: Workload, folder: str, method: str, prompt_tokens: int) -> dict[str, Any]:
    """The same run, planned."""
    settings = RunSettings(
        config=load_config(folder),
        prompt_tokens=prompt_tokens,
        completion_tokens=workload.max_new_tokens,
        prompts_per_rollout=workload.prompts,
        samples_per_prompt=workload.samples,
        micro_batches=workload.minibatches,
        eval_prompts=workload.prompts,
        eval_samples=workload.samples,
        dtype=getattr(torch, workload.dtype),
        mixed_precision=workload.dtype == "bfloat16",
        lora=LoraSettings(workload.rank, workload.alpha),
    )
    (found,) = [planned for planned in plan_memory(settings, SingleDevice()) if planned.method == method]
    moments = {name: {**asdict(parts), "total": parts.total} for name, parts in found.moments.items()}
    return {"planned": moments, "planned_process": START + found.process, "planned_trainable": found.trainable}


def main() -> None:
    """Argument: `{"workload": {...}, "folder": path, "method": name, "threads": N}`."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    workload = Workload(**request["workload"])
    result = measure(workload, request["folder"], request["method"])
    print(json.dumps({**result, **plan(workload, request["folder"], request["method"], result["prompt_tokens"])}))


if __name__ == "__main__":
    main()
