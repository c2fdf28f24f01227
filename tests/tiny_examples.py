"""Small supervised and preference runs: rows of sums, and modules and data with short defaults."""

import json
from pathlib import Path
from typing import Any

import torch
from tiny_runs import build_adapter, build_trainer

from hybrid_lightning.data import DemonstrationFormat, FileSource, PreferenceFormat, PromptDataModule
from hybrid_lightning.losses import DPOLoss
from hybrid_lightning.training import PreferenceModule, SupervisedModule

KINDS = {"supervised": (SupervisedModule, DemonstrationFormat), "preference": (PreferenceModule, PreferenceFormat)}


def write_rows(path: Path, count: int = 24) -> Path:
    """Sums with a right answer of one length or another, and a wrong one."""
    rows = []
    for n in range(count):
        a, b = n // 5, n % 5
        answer = f"{a + b}" if n % 2 else f"{b}+{a}={a + b}"
        rows.append({"question": f"{a}+{b}=", "completion": answer, "chosen": answer, "rejected": f"{a + b + 1}"})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def build_module(kind: str, model: Path, **arguments: Any) -> Any:
    """Steps of 8 examples, by plain SGD, so that a gradient can be read off the weights."""
    defaults = {"examples_per_step": 8, "optimizer": torch.optim.SGD, "lr_full": 0.05, "lr_lora": 0.1}
    if kind == "preference":
        defaults["loss"] = DPOLoss(beta=0.5)
    return KINDS[kind][0](**{**defaults, "model": str(model), **arguments})


def build_examples(kind: str, rows: Path, **arguments: Any) -> PromptDataModule:
    """All rows for training; give `validation_fraction` for others."""
    return PromptDataModule(FileSource(str(rows), answer_column=None, **arguments), KINDS[kind][1]())


def fit(kind: str, model: Path, rows: Path, root: Path, *callbacks: Any, arguments: Any = None, ckpt=None, **flags: Any) -> Any:
    """Train, and give the module."""
    torch.manual_seed(11)
    module = build_module(kind, model, **(arguments or {}))
    data = build_examples(kind, rows, validation_fraction=0.25)
    build_trainer(root, build_adapter(), *callbacks, **flags).fit(module, datamodule=data, ckpt_path=ckpt)
    return module
