"""Runs to measure and plan the memory of: completions of full length, all with an advantage."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tiny_runs import build_trainer

from benchmarks.memory.probe import MemoryProbe
from benchmarks.training import GivenPrompts, HashedReward
from hybrid_lightning.adapters import AdapterPlan, ModuleBudget
from hybrid_lightning.callbacks import HybridAdapterSetup
from hybrid_lightning.losses import GRPOLoss
from hybrid_lightning.memory import RunSettings, TrainerFlags
from hybrid_lightning.rollout import Sampler
from hybrid_lightning.training import PolicyModule


@dataclass(frozen=True)
class Case:
    """A run of the embedded policy, on a base of 16 bits where its products have these."""

    share: float = 0.0
    precision: str = "32-true"
    completion_tokens: int = 20
    validation: int = 6
    keep_start_weights: bool = True
    more: dict[str, Any] = field(default_factory=dict)  # arguments of the policy

    @property
    def policy(self) -> dict[str, Any]:
        """Arguments of the policy."""
        parts = {"loss": GRPOLoss(), "reward": HashedReward(), "sampler": Sampler(max_new_tokens=self.completion_tokens)}
        sizes = {"prompts_per_rollout": 8, "samples_per_prompt": 4, "eval_samples": 4}
        dtype = "float32" if self.precision == "32-true" else "bfloat16"
        return {**parts, **sizes, "model": "embedded", "dtype": dtype, **self.more}

    @property
    def adapter(self) -> HybridAdapterSetup:
        return HybridAdapterSetup(ModuleBudget(self.share), rank=8, keep_start_weights=self.keep_start_weights)

    def settings(self, plan: AdapterPlan | None = None) -> RunSettings:
        """The same run, to be planned."""
        flags = TrainerFlags.of({"accelerator": "cpu", "devices": 1, "precision": self.precision})
        settings = RunSettings.of(PolicyModule(**self.policy), self.adapter, None, flags, prompt_tokens=6)
        return replace(settings, eval_prompts=self.validation, plan=plan)

    def measure(self, root: Path) -> tuple[dict[str, dict[str, int]], AdapterPlan]:
        """Largest memory of each moment, and what was trained."""
        policy = PolicyModule(**self.policy)
        policy.policy.pretrained.stop_ids = [1_000]  # no such token: nothing ends
        probe = MemoryProbe()
        # To the first step of the second rollout, which finds gradients and optimizer state.
        steps = policy.task.schedule.minibatches_per_rollout + 1
        # A validation drops gradients, which the next rollout would else find.
        flags = {"max_steps": steps, "val_check_interval": steps, "check_val_every_n_epoch": None}
        trainer = build_trainer(root, probe, self.adapter, precision=self.precision, **flags)
        products = [f"{100 + i}*{i % 9}=" for i in range(64)]  # of six characters, which are six tokens
        with probe.measuring():
            trainer.fit(policy, datamodule=GivenPrompts(products, self.validation))
        return probe.moments, policy.plan


def with_flags(settings: RunSettings, **flags: Any) -> RunSettings:
    """The run with other flags of the Trainer."""
    return replace(settings, flags=replace(settings.flags, **flags))
