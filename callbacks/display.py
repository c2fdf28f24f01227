"""What the callbacks share to show things: the console, commands to type, and a progress bar."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch import Trainer
from rich import get_console
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hybrid_lightning.callbacks.run_folder import run_folder

Advance = Callable[[int, int | None], None]


def console() -> Console:
    """The global console, which the progress bars share, so that lines appear above a bar and not through it."""
    return get_console()


def python_command() -> str:
    """What to type for this Python: its path where its virtual environment is not activated, as in `.venv/bin/python`."""
    if sys.prefix == sys.base_prefix or "VIRTUAL_ENV" in os.environ:
        return "python"
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def resume_command(trainer: Trainer, checkpoint: Path) -> str:
    """The command that goes on from a checkpoint, or from what scoring has found."""
    command = getattr(trainer, "command", "fit")
    return f"{python_command()} -m hybrid_lightning {command} --config {run_folder(trainer)}/config.yaml --ckpt_path {checkpoint}"


def test_command(trainer: Trainer, checkpoint: str) -> str:
    """The command that measures a checkpoint on the test problems."""
    return f"{python_command()} -m hybrid_lightning test --config {run_folder(trainer)}/config.yaml --ckpt_path {checkpoint}"


@contextmanager
def progress_bar(trainer: Trainer, description: str, total: int | None) -> Iterator[Advance]:
    """A bar that goes away when done; nothing on other ranks or under `enable_progress_bar=False`.

    Args:
        trainer: Decides whether a bar is wanted.
        description: Stands before the bar.
        total: Steps; None if only known later.

    Yields:
        A function to call with (steps done, total or None to keep it).
    """
    if trainer.progress_bar_callback is None or not trainer.is_global_zero:
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(), transient=True) as progress:
        task = progress.add_task(description, total=total)

        def advance(done: int, new_total: int | None) -> None:
            progress.update(task, completed=done, total=total if new_total is None else new_total)

        yield advance
