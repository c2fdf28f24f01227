"""`write_policy`: a policy in a form, into a new folder."""

from pathlib import Path

import torch

from hybrid_lightning.export.form import ExportForm
from hybrid_lightning.export.licence import copy_licence_files
from hybrid_lightning.export.model_card import model_card
from hybrid_lightning.export.new_folder import new_folder
from hybrid_lightning.export.trained import TrainedPolicy


def write_policy(policy: TrainedPolicy, form: ExportForm, target: str | Path) -> Path:
    """Export a policy with model card, plan and the base's licence files. No random state changes, so that a run may go on.

    Args:
        policy: To export.
        form: As what.
        target: A new or empty folder. It is there whole or not at all.

    Returns:
        The folder.

    Raises:
        ConfigError: If the target holds something, or the form cannot hold the plan.
        PlanError: If the base model is not the one that was adapted.
    """
    form.check(policy.plan)
    target = Path(target)
    with new_folder(target) as folder, torch.random.fork_rng(devices=[]):
        form.write(policy, folder)
        (folder / "README.md").write_text(model_card(policy, form), encoding="utf-8")
        policy.plan.save(folder / "plan.json")
        copy_licence_files(policy.base, folder)
    return target


def written(policy: TrainedPolicy, form: ExportForm, folder: str | Path) -> str:
    """What the screen says when a policy has been written."""
    dtype = form.weights_dtype(policy)
    return f"Policy written to {folder}{f' in {dtype}' if dtype else ''}"
