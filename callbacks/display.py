"""Output shared by callbacks: the console, commands for the user to type, and a progress bar."""

import json
import os
import shlex
import shutil
import sys
import time
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
from rich.table import Table

from hybrid_lightning.callbacks.loggers import from_here
from hybrid_lightning.callbacks.run_folder import known_folder
from hybrid_lightning.data import PromptDataModule

Advance = Callable[[int, int | None], None]
_MINUTE_S = 60.0
_SCRIPT = "hybrid-lightning"


def console() -> Console:
    """The global console. Progress bars use it too, so that lines appear above a bar instead of inside it."""
    return get_console()


def say(text: str) -> None:
    """Print text without markup, since paths may look like markup, and without wrapping, so that commands can be copied."""
    console().print(text, soft_wrap=True, markup=False, highlight=False)


def show_table(table: Table) -> None:
    """Print a table; in a file or pipe its width is not limited to a screen."""
    (console() if console().is_terminal else Console(width=10_000)).print(table)


def show_markdown(text: str) -> None:
    """Print a text in Markdown, as wide as the terminal; in a file or pipe 80 columns."""
    from rich.markdown import Markdown  # takes a quarter of a second to import

    console().print(Markdown(text))


def command_line(*arguments: str | Path) -> str:
    """A command of this package with its arguments, quoted for a shell.

    It begins as this process was started: with the console script, or with `python`. If the virtual environment is not activated
    it has the program's path, such as `.venv/bin/python`.
    """
    if Path(sys.argv[0]).name == _SCRIPT:
        script = _SCRIPT if shutil.which(_SCRIPT) == sys.argv[0] else from_here(Path(sys.argv[0]))
        return shlex.join([script, *map(str, arguments)])
    activated = sys.prefix == sys.base_prefix or "VIRTUAL_ENV" in os.environ
    python = "python" if activated else from_here(Path(sys.executable))
    return shlex.join([python, "-m", "hybrid_lightning", *map(str, arguments)])


def saved_config(trainer: Trainer) -> Path | None:
    """The config that a command-line run has saved; None for a run from Python, which no command can continue.

    This does not make a run folder, and does not communicate with other ranks.
    """
    folder = known_folder(trainer)
    return folder / "config.yaml" if folder is not None and (folder / "config.yaml").is_file() else None


def resume_command(trainer: Trainer, checkpoint: str | Path) -> str:
    """The command that resumes from a checkpoint; for a run from Python, the argument to pass.

    This does not communicate with other ranks.
    """
    command, config = getattr(trainer, "command", "fit"), saved_config(trainer)
    if config is None:
        return f"Trainer.{command}(..., ckpt_path={str(checkpoint)!r})"
    return command_line(command, "--config", config, "--ckpt_path", checkpoint)


def evaluation_command(trainer: Trainer, checkpoint: str) -> str:
    """The command that evaluates a checkpoint on the test problems, or on the validation problems if there are no test problems.

    It can be run as it is. It is "" if the run was started from Python or the data has neither kind of problems.
    """
    config = saved_config(trainer)
    if config is None or not Path(checkpoint).exists():
        return ""
    for command, loader in (("test", "test_dataloader"), ("validate", "val_dataloader")):
        if _has(getattr(trainer, "datamodule", None), command, loader):
            return command_line(command, "--config", config, "--ckpt_path", checkpoint)
    return ""


def export_command(run: Path, folder: str | Path, validated: bool) -> str:
    """The command that evaluates an exported policy like its run, with the reward, format and data of the run's config.

    It can be run as it is. It is "" if there is no config, or no data to evaluate on. `validated` is whether the run was
    validated.
    """
    config, summary = run / "config.yaml", run / "summary.json"
    if not config.is_file():
        return ""
    words = shlex.split(json.loads(summary.read_text())["next_command"]) if summary.is_file() else []
    command = next((word for word in words if word in ("test", "validate")), "validate" if validated and not words else None)
    given: Any = yaml.safe_load(config.read_text(encoding="utf-8"))
    arguments = given["model"].get("init_args", {})
    compares_alone = given["model"]["class_path"].endswith("PreferenceModule") and not arguments.get("reward")
    if command is None or compares_alone:  # an export has no start policy to compare preferences with
        return ""
    # Options about the model before training, not about the export.
    gone = [f"--model.{name}=null" for name in ("revision", "quantization") if arguments.get(name) is not None]
    gone += ["--adapter.plan=null"] if given.get("adapter", {}).get("plan") is not None else []
    return command_line(command, "--config", config, f"--model.model={folder}", *gone)


def _has(datamodule: Any, command: str, loader: str) -> bool:
    """Whether a data module has the data that a command needs, determined in the same way as by the command."""
    if not isinstance(datamodule, PromptDataModule):
        return datamodule is not None and is_overridden(loader, datamodule)
    try:
        datamodule.setup(command)
    except Exception:  # errors in rows that the run did not need must not replace its summary
        return False
    return True


def minute_lines(description: str) -> Advance:
    """Return a function that prints progress once a minute, for a screen without a progress bar."""
    last = time.monotonic()

    def advance(done: int, total: int | None) -> None:
        nonlocal last
        if time.monotonic() - last >= _MINUTE_S:
            last = time.monotonic()
            say(f"{description}: {done}" if total is None else f"{description}: {done}/{total}")

    return advance


@contextmanager
def progress_bar(trainer: Trainer, description: str, total: int | None) -> Iterator[Advance]:
    """Show a progress bar that disappears at the end.

    In a file, lines take its place. Other ranks show nothing, nor does a run without progress bars.

    Yields:
        A function to call with (steps done, total). None as total keeps the previous one; the total may become known only then.
    """
    if trainer.is_global_zero and not console().is_terminal and not console().is_jupyter:
        say(f"{description} ...")
        advance = minute_lines(description)
        yield lambda done, new_total: advance(done, new_total or total)
        return
    if trainer.progress_bar_callback is None or not trainer.is_global_zero:
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(), transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done, new_total: progress.update(task, completed=done, total=new_total)
