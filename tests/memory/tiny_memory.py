"""Runs of which the memory is measured and planned: completions of full length, all with an advantage."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tiny_runs import build_trainer

from benchmarks.memory.probe import MemoryProbe
from benchmarks.training import GivenPrompts, HashedReward
from hybrid_lightning.adapters import AdapterPlan, ModuleBudget, Scorer
from hybrid_lightning.callbacks import HybridAdapterSetup
from hybrid_lightning.losses import GRPOLoss
from hybrid_lightning.memory import RunSettings
from hybrid_lightning.memory.from_config import TrainerFlags, policy_arguments, run_settings
from hybrid_lightning.policy import PolicyModule
from hybrid_lightning.rollout import Sampler


@dataclass(frozen=True)
class Case:
    """Sizes of a run of the embedded policy."""

    prompts: int = 8
    samples: int = 4
    completion_tokens: int = 20
    micro_batches: int = 1
    max_tokens: int | None = None
    validation: int = 12
    eval_samples: int = 4
    share: float = 0.0
    keep_start_weights: bool = True
    checkpointing: bool = False
    dtype: str = "float32"
    precision: str = "32-true"
    optimizer: Any = torch.optim.AdamW
    scorer: Scorer | None = None

    @property
    def policy(self) -> dict[str, Any]:
        """Arguments of the policy."""
        return {
            "loss": GRPOLoss(),
            "reward": HashedReward(),
            "model": "embedded",
            "dtype": self.dtype,
            "sampler": Sampler(max_new_tokens=self.completion_tokens),
            "prompts_per_rollout": self.prompts,
            "samples_per_prompt": self.samples,
            "minibatches_per_rollout": self.micro_batches,
            "max_tokens_per_micro_batch": self.max_tokens,
            "gradient_checkpointing": self.checkpointing,
            "eval_samples": self.eval_samples,
            "optimizer": self.optimizer,
        }

    @property
    def adapter(self) -> HybridAdapterSetup:
        kept = {"keep_start_weights": self.keep_start_weights}
        return HybridAdapterSetup(budget=ModuleBudget(self.share), scorer=self.scorer, rank=8, **kept)

    def settings(self, plan: AdapterPlan | None = None) -> RunSettings:
        """The same run, to be planned."""
        flags = TrainerFlags.of({"accelerator": "cpu", "devices": 1, "precision": self.precision})
        settings = run_settings(policy_arguments(PolicyModule, **self.policy), self.adapter, None, flags, prompt_tokens=6)
        return replace(settings, eval_prompts=self.validation, plan=plan)

    def measure(self, root: Path) -> tuple[dict[str, dict[str, int]], AdapterPlan]:
        """Largest memory of each moment, and what was trained."""
        policy = PolicyModule(**self.policy)
        policy.pretrained.stop_ids = [1_000]  # no such token: nothing ends
        probe = MemoryProbe()
        steps = self.micro_batches + 1  # to the first of the second rollout, which finds gradients and optimizer state
        # A validation drops gradients, which the next rollout would else find.
        flags = {"max_steps": steps, "val_check_interval": steps, "check_val_every_n_epoch": None}
        trainer = build_trainer(root, probe, self.adapter, precision=self.precision, **flags)
        products = [f"{100 + i}*{i % 9}=" for i in range(64)]  # of six characters, which are six tokens
        with probe.measuring():
            trainer.fit(policy, datamodule=GivenPrompts(products, self.validation))
        return probe.moments, policy.plan
