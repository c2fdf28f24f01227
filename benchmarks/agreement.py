"""How far the log-probabilities of sampling and those of training are apart for the same tokens under the same weights.

    python benchmarks/agreement.py                                # SmolLM2 in bfloat16 and the embedded policy in float32
    python benchmarks/agreement.py --workload tiny --steps 20

Trains a workload of `workloads.py` for some steps, so that LoRA is not zero, and compares each rollout before it is learned from.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import run_ours  # first: it prepares the process
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from pairs import Plan, prepare
from tables import table
from worker import Settings
from workloads import WORKLOADS, Workload

from hybrid_lightning.adapters.budgets import ModuleBudget
from hybrid_lightning.callbacks import HybridAdapterSetup
from hybrid_lightning.policy.module import PolicyModule

SHARES = (0.5, 0.9, 0.99, 0.999)
LEARNING_RATE = 1e-4  # ten times that of the comparison with TRL: weights move


class Compare(Callback):
    """Notes the differences of every token that is trained on, in nats."""

    def __init__(self) -> None:
        self.differences: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: LightningTrainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before the optimizer steps of a rollout."""
        assert isinstance(pl_module, PolicyModule)
        if batch.old_logprobs is None:  # the policy is still the one that sampled
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                logprobs, _ = pl_module.logprobs(batch.sequences)
            self.differences.append((logprobs - batch.sampling_logprobs)[batch.sequences.completion_mask].abs())


def measure(workload: Workload, steps: int, seed: int) -> torch.Tensor:
    """Differences of all compared tokens."""
    workload = replace(workload, learning_rate=LEARNING_RATE)
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(pairs=steps, device="cpu", threads=torch.get_num_threads(), seed=seed, sides=("ours",), logs=Path(folder))
        (made,) = prepare([workload], Path(folder), plan)
        settings = Settings(workload, made, plan.device, plan.threads, steps, seed)
        compare = Compare()
        adapter = HybridAdapterSetup(budget=ModuleBudget(share=0.0), rank=workload.rank, alpha=workload.alpha)
        run_ours.train(settings, run_ours.build_policy(settings), [adapter, compare])
    return torch.cat(compare.differences)


def main() -> None:
    """Print a row for each workload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=["main", "tiny"])
    parser.add_argument("--steps", type=int, default=5, help="rollouts of each")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    rows = []
    for name in arguments.workload:
        found = measure(WORKLOADS[name], arguments.steps, arguments.seed)
        values = [found.mean(), *found.double().quantile(torch.tensor(SHARES, dtype=torch.float64)), found.max()]
        rows.append([name, WORKLOADS[name].dtype, str(len(found)), *(f"{float(value):.2g}" for value in values)])
    print(table(["workload", "weights", "tokens", "mean", *(f"{share:.1%} below" for share in SHARES), "largest"], rows))


if __name__ == "__main__":
    main()
