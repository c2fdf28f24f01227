"""`trainer.deterministic=true` works under every strategy, for every kind of training and for prediction."""

from pathlib import Path
from typing import Any

import pytest
import torch
from examples_on_ranks import train_on_ranks
from ranks_of_tests import run
from runs_of_tests import predict, train
from test_equal_to_one_process import STRATEGIES
from tiny_examples import write_rows

from hybrid_lightning.losses import DAPOLoss


def everything(folder: Path, root: Path, strategy: Any, devices: int) -> list[bool]:
    """Whether the flag held after each kind."""
    policy = {"loss": DAPOLoss(entropy_coef=0.01, kl_coef=0.01)}
    flags = {"strategy": strategy, "devices": devices}
    held = []
    train(folder, root / "policy", policy=policy, max_steps=2, val_check_interval=2, deterministic=True, **flags)
    held.append(torch.are_deterministic_algorithms_enabled())
    train_on_ranks(folder, root / "examples", deterministic=True, **flags)
    held.append(torch.are_deterministic_algorithms_enabled())
    predict(folder, root / "predictions", **flags)
    return [*held, torch.are_deterministic_algorithms_enabled()]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_works_on_two_ranks(folder, tmp_path, strategy):
    write_rows(folder / "rows.jsonl", 28)
    arguments = {"folder": folder, "root": tmp_path / "run", "strategy": STRATEGIES[strategy], "devices": 2}
    assert run(2, tmp_path / "ranks", everything, timeout_s=120, **arguments) == [[True] * 3] * 2
