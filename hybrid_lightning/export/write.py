"""`write_policy`: exports a policy in a form into a new folder, which appears complete or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import torch

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.export.model_card import copy_licence_files, model_card
from hybrid_lightning.export.trained import ExportForm, TrainedPolicy
from hybrid_lightning.sharding.atomic import flush


def write_policy(policy: TrainedPolicy, form: ExportForm, target: str | Path) -> Path:
    """Export a policy together with a model card, its plan and the licence files of the base model; returns the folder.

    The random state stays unchanged, so an export does not affect a run that continues.

    Args:
        policy: The policy to export.
        form: The form to export it in.
        target: Path of a new or empty folder, which appears complete or not at all.

    Raises:
        ConfigError: If the target is not empty, or the form cannot hold what the plan trains.
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


def written_message(policy: TrainedPolicy, form: ExportForm, folder: str | Path) -> str:
    """Message for the screen after a policy has been written."""
    dtype = form.weights_dtype(policy)
    return f"Policy written to {folder}{f' in {dtype}' if dtype else ''}"


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Context to fill a temporary folder beside the target, which is renamed to the target when it is complete and on the disk.

    If the process is killed, it leaves `.NAME.XXXXXXXX.partial`, which cannot be mistaken for the target. Missing parent folders
    are made.

    Raises:
        ConfigError: If the target is not empty, before writing or at the end.
    """
    target = target.absolute()
    check_target(target)
    partial = target.with_name(f".{target.name}.{uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            flush(path)
        check_target(target)
        partial.replace(target)  # replaces an empty folder
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    flush(target.parent)


def check_target(target: Path) -> None:
    """Check that an export can be written to a folder and overwrites nothing.

    Raises:
        ConfigError: If the target is a file, a folder that is not empty, or in a folder that cannot be written to.
    """
    if target.is_dir():
        if next(target.iterdir(), None) is not None:
            raise ConfigError(f"folder={str(target)!r} exists and is not empty; give a new folder, or remove this one")
    elif target.exists() or target.is_symlink():
        raise ConfigError(f"folder={str(target)!r} is a file; give a new folder")
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ConfigError(f"folder={str(target)!r}: {above} is not a writable folder; give a folder elsewhere")
