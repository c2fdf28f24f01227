"""Supervised and preference training that does the same work on any number of ranks."""

from pathlib import Path
from typing import Any

from runs_of_tests import weights
from tiny_examples import KINDS, fit


def train_on_ranks(folder: Path, root: Path, strategy: Any = "auto", devices: int = 1, **more: Any) -> dict[str, Any]:
    """Both kinds, trained and validated."""
    found = {}
    for kind in KINDS:
        flags = {"strategy": strategy() if callable(strategy) else strategy, "devices": devices, "max_steps": 2}
        flags |= {"gradient_clip_val": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None, **more}
        trained = fit(kind, folder / "model", folder / "rows.jsonl", root / kind, arguments={"examples_per_step": 12}, **flags)
        values = {name: float(value) for name, value in trained.trainer.callback_metrics.items()}
        found[kind] = {"metrics": values, "weights": weights(trained), "plan": trained.plan.to_dict()}
    return found
