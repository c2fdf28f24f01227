"""What the callbacks share to show things: the console, commands to type, and a progress bar."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich import get_console
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hybrid_lightning.callbacks.run_folder import find_run_folder
from hybrid_lightning.data import PromptDataModule

Advance = Callable[[int, int | None], None]


def console() -> Console:
    """The global console, which the progress bars share, so that lines appear above a bar and not through it."""
    return get_console()


def say(text: str) -> None:
    """Print lines as they are: a path may look like markup, and what is meant to be copied is not cut to fit the screen."""
    console().print(text, soft_wrap=True, markup=False, highlight=False)


def python_command() -> str:
    """What to type for this Python: its path where its virtual environment is not activated, as in `.venv/bin/python`."""
    if sys.prefix == sys.base_prefix or "VIRTUAL_ENV" in os.environ:
        return "python"
    path = Path(sys.executable)
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


def command_line(*arguments: str | Path) -> str:
    """A command of this package as it is typed into a shell, whatever its paths are called.

    Args:
        arguments: The command, and what follows it.
    """
    return f"{python_command()} -m hybrid_lightning {shlex.join(map(str, arguments))}"


def saved_config(trainer: Trainer) -> Path | None:
    """The config that a run of the command line has written; None for one of Python, which no command can go on from.

    No run folder is made, and nothing is asked from other ranks.
    """
    holder = find_run_folder(trainer)
    config = None if holder is None or holder.path is None else holder.path / "config.yaml"
    return config if config is not None and config.is_file() else None


def resume_command(trainer: Trainer, checkpoint: str | Path) -> str:
    """What to type to go on from a checkpoint, or from what scoring has found; in Python, which argument to give.

    Nothing is asked from other ranks.
    """
    command, config = getattr(trainer, "command", "fit"), saved_config(trainer)
    if config is None:
        return f"Trainer.{command}(..., ckpt_path={str(checkpoint)!r})"
    return command_line(command, "--config", config, "--ckpt_path", checkpoint)


def evaluation_command(trainer: Trainer, checkpoint: str) -> str:
    """The command that measures a checkpoint: on the test problems, or where there are none on those of validation.

    Args:
        trainer: Of the process that writes, at the end of a run.
        checkpoint: To measure.

    Returns:
        What will run as it is; "" if nothing would, as where the run was started from Python or the data has neither.
    """
    config = saved_config(trainer)
    if config is None or not Path(checkpoint).exists():
        return ""
    for command, split in (("test", "test"), ("validate", "validation")):
        if _has(getattr(trainer, "datamodule", None), command, split):
            return command_line(command, "--config", config, "--ckpt_path", checkpoint)
    return ""


def export_command(run: Path, folder: str | Path, validated: bool) -> str:
    """The command that measures an exported policy as its run was measured: by the reward, format and data of the run's config.

    Args:
        run: Folder of the run.
        folder: Of the export.
        validated: Whether the run was validated, so that `validate` will run.

    Returns:
        What will run as it is; "" if there is no such config, or it has nothing to measure by.
    """
    config, summary = run / "config.yaml", run / "summary.json"
    if not config.is_file():
        return ""
    words = shlex.split(json.loads(summary.read_text())["next_command"]) if summary.is_file() else []
    command = next((word for word in words if word in ("test", "validate")), "validate" if validated and not words else None)
    given: Any = yaml.safe_load(config.read_text(encoding="utf-8"))
    arguments = given["model"].get("init_args", {})
    compares_alone = given["model"]["class_path"].endswith("PreferenceModule") and not arguments.get("reward")
    if command is None or compares_alone:  # with the policy before training, which an export has not
        return ""
    # Of the model that was trained, and not of what came of it.
    gone = [f"--model.{name}=null" for name in ("revision", "quantization") if arguments.get(name) is not None]
    gone += ["--adapter.plan=null"] if given.get("adapter", {}).get("plan") is not None else []
    return command_line(command, "--config", config, f"--model.model={folder}", *gone)


def _has(datamodule: Any, command: str, split: str) -> bool:
    """Whether a data module has what a command needs, found out in the way that the command would."""
    if not isinstance(datamodule, PromptDataModule):
        loader = {"test": "test_dataloader", "validation": "val_dataloader"}[split]
        return datamodule is not None and is_overridden(loader, datamodule)
    try:
        datamodule.setup(command)
    except Exception:  # whatever is wrong with rows that the run did not need must not take the place of its summary
        return False
    return True


@contextmanager
def progress_bar(trainer: Trainer, description: str, total: int | None) -> Iterator[Advance]:
    """A bar that goes away when done; nothing on other ranks, in a file, or under `enable_progress_bar=False`.

    Args:
        trainer: Decides whether a bar is wanted.
        description: Stands before the bar.
        total: Steps; None if only known later.

    Yields:
        A function to call with (steps done, total or None to keep it).
    """
    if trainer.progress_bar_callback is None or not trainer.is_global_zero or not console().is_terminal:
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(), transient=True) as progress:
        task = progress.add_task(description, total=total)

        def advance(done: int, new_total: int | None) -> None:
            progress.update(task, completed=done, total=total if new_total is None else new_total)

        yield advance
