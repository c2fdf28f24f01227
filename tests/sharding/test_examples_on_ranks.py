"""Supervised and preference training on two ranks: the plan, losses, weights and validation of one process."""

import pytest
import torch
from examples_on_ranks import train_on_ranks
from ranks_of_tests import run
from rounding import metrics_of_runs
from tiny_examples import KINDS, write_rows
from tiny_runs import write_model

from hybrid_lightning.sharding.fsdp1 import FSDP1Strategy
from hybrid_lightning.sharding.fsdp2 import FSDP2Strategy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    write_model(folder / "model")
    write_rows(folder / "rows.jsonl", 28)
    return folder


@pytest.fixture(scope="module")
def single(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("single")
    return run(1, root / "process", train_on_ranks, folder=folder, root=root / "run")[0]


@pytest.mark.parametrize("strategy", ["ddp", FSDP2Strategy, FSDP1Strategy], ids=["ddp", "fsdp2", "fsdp1"])
def test_it_is_the_same_run(folder, tmp_path, single, strategy):
    arguments = {"folder": folder, "root": tmp_path / "run", "strategy": strategy, "devices": 2}
    for result in run(2, tmp_path / "ranks", train_on_ranks, **arguments):
        for kind in KINDS:
            assert result[kind]["plan"] == single[kind]["plan"], kind
            assert result[kind]["metrics"] == pytest.approx(single[kind]["metrics"], **metrics_of_runs()), kind
            torch.testing.assert_close(result[kind]["weights"], single[kind]["weights"], atol=1e-5, rtol=0)
            assert {"loss", "val/loss", "grad_norm/full"} <= result[kind]["metrics"].keys()
