"""`RunFolder`: the folder of a run, which no other run has.

    ROOT/NAME/version_N      such as runs/gspo/version_0

ROOT and NAME are those of the first logger. The first process claims the folder by one `mkdir`, which only one of any number of
runs can succeed with, and tells the others; from then on all know it, and nobody asks again.
"""

import itertools
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger

from hybrid_lightning.callbacks.loggers import keeps_files_in_a_version, made_already, put_into, where
from hybrid_lightning.errors import ConfigError

Version = int | str

_LOGS = ("events.out.tfevents.*", "hparams.yaml", "metrics.csv")


class RunFolder(Callback):
    """Holds the folder of a run, and puts into it what loggers and `ModelCheckpoint` would put elsewhere.

    Our Trainer has it from the start, and claims the folder before loggers make theirs. Lightning's own Trainer gets it from the
    first callback that asks for the folder: its loggers have theirs by then, and the first one's is taken over if nothing but a
    log is in it.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self._in_use = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All is set up, and the run begins."""
        self._in_use = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The run begins."""
        self._in_use = True

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The run begins."""
        self._in_use = True

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The run begins."""
        self._in_use = True

    def claim(self, trainer: Trainer) -> Path:
        """Make the folder; all processes have to call this together."""
        answer: tuple[Any, str | None] = (None, None)
        if trainer.is_global_zero:
            try:
                answer = (_taken_over(trainer.loggers) or _new_folders(trainer), None)
            except OSError as error:  # the others wait for an answer
                answer = (None, f"the run folder cannot be made: {error}; give trainer.logger another save_dir")
        folder, error_text = trainer.strategy.broadcast(answer)
        if error_text is not None:
            raise ConfigError(error_text)
        self.path, version = folder
        put_into(trainer.loggers, version)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.path / "checkpoints")
        return self.path

    def give_back(self) -> None:
        """Remove the folder if the run ended before it began, and has made nothing but its config and empty logs."""
        if self.path is None or self._in_use:
            return
        begun = (*_LOGS, "config.yaml", "checkpoints")
        if all(any(path.match(name) for name in begun) for path in self.path.iterdir()):
            shutil.rmtree(self.path, ignore_errors=True)


def run_folder(trainer: Trainer) -> Path | None:
    """Folder of this run's files; None under `fast_dev_run`, which leaves nothing behind.

    The first call makes it, and all processes make that one together: under our Trainer it is Lightning's, before anything is set
    up, else that of the first `setup` hook. Later ones ask nobody.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    holder = find_run_folder(trainer)
    if holder is None:
        trainer.callbacks.append(holder := RunFolder())  # type: ignore[attr-defined]
    return holder.path or holder.claim(trainer)


def find_run_folder(trainer: Trainer) -> RunFolder | None:
    """The Trainer's `RunFolder`, if it has one."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, RunFolder)), None)  # type: ignore[attr-defined]


def _new_folders(trainer: Trainer) -> tuple[Path, Version]:
    """The first folder that could be made, with that of the same version for each logger that keeps its files elsewhere."""
    places = [where(logger, fallback=_root(trainer)) for logger in trainer.loggers]
    parents = [place.parent for place in places[:1]] or [_without_logger(trainer)]
    parents += [place.parent for place in places if place.has_versions and place.parent not in parents]
    asked = next((place.version for place in places if place.version not in (None, "")), None)
    for parent in parents:
        parent.mkdir(parents=True, exist_ok=True)
    for name, version in _names(asked, parents):
        made: list[Path] = []
        try:
            for parent in parents:
                (parent / name).mkdir()
                made.append(parent / name)
        except FileExistsError:
            for folder in made:
                folder.rmdir()
            continue
        return made[0], version
    raise AssertionError("there is no last name")


def _names(asked: Version | None, parents: Iterable[Path]) -> Iterator[tuple[str, Version]]:
    """What a folder may be called: as asked for, and where that is taken with a number, as Lightning's checkpoints have it."""
    if isinstance(asked, str):
        yield asked, asked
        yield from ((name := f"{asked}-v{number}", name) for number in itertools.count(1))
    if asked is not None:
        yield f"version_{asked}", asked
    found = (re.fullmatch(r"version_(\d+)", path.name) for parent in parents for path in parent.iterdir())
    first = max((int(match[1]) + 1 for match in found if match), default=0)
    yield from ((f"version_{number}", number) for number in itertools.count(first))


def _taken_over(loggers: list[Logger]) -> tuple[Path, Version] | None:
    """The folder that the first logger has made for itself, unless it is another run's: it holds a log alone."""
    if not loggers or not keeps_files_in_a_version(loggers[0]) or not made_already(loggers[0]):
        return None
    place = where(loggers[0], fallback=Path())
    assert place.version is not None
    folder = place.parent / (place.version if isinstance(place.version, str) else f"version_{place.version}")
    if not folder.is_dir() or any(not any(path.match(log) for log in _LOGS) for path in folder.iterdir()):
        return None
    try:
        (folder / "checkpoints").mkdir()  # of two runs whose loggers share a folder, only one succeeds
    except FileExistsError:
        return None
    return folder, place.version


def _root(trainer: Trainer) -> Path:
    """Where files go that no logger has a place for."""
    root = Path(trainer.default_root_dir)
    return Path("runs") if root == Path.cwd() else root


def _without_logger(trainer: Trainer) -> Path:
    root = _root(trainer)
    return root / "default" if root == Path("runs") else root
