"""`RunFolder`: the folder of a run, which no other run has.

    ROOT/NAME/version_N      such as runs/gspo/version_0

ROOT and NAME are those of the first logger. The first process claims the folder by one `mkdir`, which only one of any number of
runs can succeed with, and tells the others; from then on all know it, and nobody asks again.
"""

import itertools
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger

from hybrid_lightning.adapters.kept_scoring import SCORING, SETTINGS
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
        self._own: list[Path] = []  # with those of loggers that keep their files elsewhere
        self._above: list[Path] = []  # folders above them that had to be made
        self._in_use = False  # whether anything has been done that logs may tell of

    def keep(self) -> None:
        """Leave the folder where it is, whatever is in it: somebody is told to go on from there."""
        self._in_use = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *given: Any) -> None:
        """Something has been done."""
        self._in_use = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Likewise."""
        self._in_use = True

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Likewise."""
        self._in_use = True

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *given: Any) -> None:
        """Likewise."""
        self._in_use = True

    def claim(self, trainer: Trainer) -> Path:
        """Make the folder; all processes have to call this together."""
        answer: tuple[Any, str | None] = (None, None)
        if trainer.is_global_zero:
            try:
                self._own, version = _taken_over(trainer.loggers) or _new_folders(trainer, self._above)
                answer = ((self._own[0], version), None)
            except OSError as error:  # the others wait for an answer
                _remove_empty(self._above)
                answer = (None, _cannot_be_made(trainer, error))
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
        """Remove the folder if the run ended before it had done anything, and what is in it can be made again in no time."""
        if self.path is None or self._in_use or not self.path.is_dir():
            return
        if all(_is_no_work(path.relative_to(folder), path.is_dir()) for folder in self._own for path in folder.rglob("*")):
            for folder in self._own:
                shutil.rmtree(folder, ignore_errors=True)
            _remove_empty(self._above)


def check_run_folder(trainer: Trainer) -> None:
    """Find out whether folders of this run could be made, before anything takes long; all that is made here is removed again.

    Nothing is asked from other ranks.

    Args:
        trainer: Set up as far as its constructor does.

    Raises:
        ConfigError: If one cannot be made, or nothing be written into it.
    """
    if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
        return
    for parent in _parents(trainer)[0]:
        try:
            _try_out(parent)
        except OSError as error:
            raise ConfigError(_cannot_be_made(trainer, error)) from error
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None and "://" not in str(callback.dirpath):
            try:
                _try_out(Path(callback.dirpath))
            except OSError as error:
                raise ConfigError(
                    f"the checkpoints' folder cannot be made or written to: {error}; give --checkpoint.dirpath=FOLDER another "
                    "one, or null for one in the run folder"
                ) from error


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


def _parents(trainer: Trainer) -> tuple[list[Path], Version | None]:
    """The folders in which this run has a folder of its own, that of the first logger first; and the version asked for."""
    places = [where(logger, fallback=_root(trainer)) for logger in trainer.loggers]
    parents = [place.parent for place in places[:1]] or [_without_logger(trainer)]
    parents += [place.parent for place in places if place.has_versions and place.parent not in parents]
    return parents, next((place.version for place in places if place.version not in (None, "")), None)


def _new_folders(trainer: Trainer, made: list[Path]) -> tuple[list[Path], Version]:
    """The first folder that could be made, with that of the same version for each logger that keeps its files elsewhere.

    Args:
        trainer: Has the loggers.
        made: Takes the folders above that had to be made.
    """
    parents, asked = _parents(trainer)
    for parent in parents:
        _make(parent, made)
    for name, version in _names(asked, parents):
        new: list[Path] = []
        try:
            for parent in parents:
                _make_version(parent / name, made)
                new.append(parent / name)
        except FileExistsError:
            for folder in new:
                folder.rmdir()
            continue
        return new, version
    raise AssertionError("there is no last name")


def _make_version(folder: Path, made: list[Path]) -> None:
    for last in (False, False, True):
        try:
            _make(folder.parent, made)
            folder.mkdir()
            return
        except FileNotFoundError:  # another run may have removed what is above, being empty, since it had done nothing
            if last:
                raise


def _make(folder: Path, made: list[Path]) -> None:
    """A folder with those above it; `made` takes those that were not there."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        with suppress(FileExistsError):  # meanwhile, by another run
            path.mkdir()
            made.append(path)
    folder.mkdir(exist_ok=True)  # raises where something else is there


def _try_out(folder: Path) -> None:
    """Make a folder, write something into it, and remove all that was made."""
    made: list[Path] = []
    try:
        _make(folder, made)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
    finally:
        _remove_empty(made)


def _remove_empty(made: list[Path]) -> None:
    """Remove the folders that hold nothing, the last made first."""
    for folder in reversed(made):
        with suppress(OSError):
            folder.rmdir()


def _cannot_be_made(trainer: Trainer, error: OSError) -> str:
    option = "--trainer.logger.save_dir" if trainer.loggers else "--trainer.default_root_dir"
    return f"the run folder cannot be made or written to: {error}; give another place by {option}=FOLDER"


def _is_no_work(path: Path, is_folder: bool) -> bool:
    """Whether something in a run folder is no loss: config, logs, a plan without the scoring that it cost, and empty folders."""
    if is_folder:
        return path.name in ("checkpoints", SCORING)
    return any(path.match(name) for name in (*_LOGS, "config.yaml", "plan.json", "plan.png", f"{SCORING}/{SETTINGS}"))


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


def _taken_over(loggers: list[Logger]) -> tuple[list[Path], Version] | None:
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
    return [folder], place.version


def _root(trainer: Trainer) -> Path:
    """Where files go that no logger has a place for."""
    root = Path(trainer.default_root_dir)
    return Path("runs") if root == Path.cwd() else root


def _without_logger(trainer: Trainer) -> Path:
    root = _root(trainer)
    return root / "default" if root == Path("runs") else root
