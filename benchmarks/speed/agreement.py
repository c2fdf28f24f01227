"""Measures how much log-probabilities of sampling and of training differ: `python -m benchmarks.speed.agreement`.

Trains a workload for some rollouts, so that LoRA is not zero, and compares the same tokens under the same weights.
"""

from hybrid_lightning.process import prepare_process

prepare_process()  # as `python -m hybrid_lightning` does

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.commands import check_at_least, command, entry
from benchmarks.pairs import Plan, prepared
from benchmarks.tables import table
from benchmarks.training import Differences, build_adapter, build_policy, train
from benchmarks.workloads import WORKLOADS, Settings, Workload

SHARES = (0.5, 0.9, 0.99, 0.999)
LEARNING_RATE = 1e-4  # ten times the rate of the comparison with TRL: weights move


def build_parser() -> argparse.ArgumentParser:
    parser = command("speed.agreement", __doc__, seed=0, workload=["main", "tiny"])
    parser.add_argument("--steps", type=int, default=5, help="rollouts of each")
    return parser


def measure(workload: Workload, steps: int, seed: int) -> torch.Tensor:
    """Differences of all compared tokens, in nats."""
    workload = replace(workload, learning_rate=LEARNING_RATE)
    differences = Differences()
    with tempfile.TemporaryDirectory() as logs:
        plan = Plan(steps, "cpu", torch.get_num_threads(), seed, ("ours",), Path(logs))
        with prepared([workload], plan) as (folder,):
            settings = Settings(workload, folder, plan.device, plan.threads, steps, seed)
            train(settings, build_policy(settings), [build_adapter(workload), differences])
    return torch.cat(differences.found)


def run(arguments: argparse.Namespace) -> None:
    check_at_least(arguments, 1, "steps")
    rows = []
    for name in arguments.workload:
        found = measure(WORKLOADS[name], arguments.steps, arguments.seed)
        values = [found.mean(), *found.double().quantile(torch.tensor(SHARES, dtype=torch.float64)), found.max()]
        rows.append([f"`{name}`", WORKLOADS[name].dtype, str(len(found)), *(f"{float(value):.2g}" for value in values)])
    shares = (f"{100 * share:g}% below" for share in SHARES)
    print(table(["workload", "weights", "tokens", "mean", *shares, "largest"], rows, left=2))


main = entry(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
