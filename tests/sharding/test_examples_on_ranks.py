"""Supervised and preference training, and prediction, on two ranks: what one process gives, with deterministic algorithms too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_of_tests import run
from rounding import metrics_of_runs
from runs_of_tests import STRATEGIES, predict, weights
from tiny_examples import KINDS, fit, write_rows

UNDER = {"ddp": ["preference"]}  # and both under FSDP2


def train_and_predict(folder: Path, root: Path, strategies: dict[str, Any], devices: int = 1) -> dict[str, dict[str, Any]]:
    """Kinds of examples, trained and validated, and predictions, under each strategy."""
    found: dict[str, dict[str, Any]] = {}
    for name, make in strategies.items():
        found[name] = {}
        for kind in UNDER.get(name, KINDS):
            flags = {"strategy": make() if callable(make) else make, "devices": devices, "max_steps": 2, "deterministic": True}
            flags |= {"gradient_clip_val": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}
            place = root / name / kind
            trained = fit(kind, folder / "model", folder / "rows.jsonl", place, arguments={"examples_per_step": 12}, **flags)
            values = {metric: float(value) for metric, value in trained.trainer.callback_metrics.items()}
            found[name][kind] = {"metrics": values, "weights": weights(trained), "plan": trained.plan.to_dict()}
        records = predict(folder, root / name / "predictions", make, devices, deterministic=True)
        found[name]["predictions"] = sorted((record["index"], record["completions"]) for record in records)
    return found


@pytest.fixture(scope="module")
def single(folder, tmp_path_factory):
    write_rows(folder / "rows.jsonl", 28)
    root = tmp_path_factory.mktemp("single")
    return train_and_predict(folder, root, {"auto": "auto"})["auto"]


@pytest.fixture(scope="module")
def sharded(folder, single, tmp_path_factory):
    root = tmp_path_factory.mktemp("sharded")
    arguments = {"folder": folder, "root": root / "run", "strategies": STRATEGIES, "devices": 2}
    return run(2, root / "ranks", train_and_predict, timeout_s=240, **arguments)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_is_the_same_run(single, sharded, strategy):
    results = [ranks[strategy] for ranks in sharded]
    for result in results:
        for kind in UNDER.get(strategy, KINDS):
            assert result[kind]["plan"] == single[kind]["plan"], kind
            assert result[kind]["metrics"] == pytest.approx(single[kind]["metrics"], **metrics_of_runs()), kind
            torch.testing.assert_close(result[kind]["weights"], single[kind]["weights"], atol=1e-5, rtol=0)
            assert {"loss", "val/loss", "grad_norm/full"} <= result[kind]["metrics"].keys()
    predicted = [prediction for result in results for prediction in result["predictions"]]
    if strategy == "ddp":  # its sampler repeats one of five, so that every rank has the same number
        predicted = {index: completions for index, completions in predicted}.items()
    assert len(single["predictions"]) == 5 and sorted(predicted) == single["predictions"]
