"""`RunFolder`: a run's own folder, which no other run shares.

    ROOT/NAME/version_N      such as runs/gspo/version_0

ROOT and NAME come from the first logger. The first process claims the folder with one `mkdir`, which succeeds for only one of
several runs, and broadcasts it; from then on all processes know the folder.
"""

import itertools
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger

from hybrid_lightning.callbacks.loggers import given_version, has_begun, keeps_files_in_a_version, logger_root, write_into_version
from hybrid_lightning.errors import ConfigError

Version = int | str
_C = TypeVar("_C")

_LOGS = ("events.out.tfevents.*", "hparams.yaml", "metrics.csv")


class RunFolder(Callback):
    """Holds the folder of a run, and makes loggers and `ModelCheckpoint` write into it.

    Our Trainer adds this callback at the start, and claims the folder before loggers make theirs. Under Lightning's own Trainer,
    the first callback that needs the folder adds it. By then the loggers have their folders, and the first logger's folder is
    taken over if it contains only a log.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self._own: list[Path] = []  # the folder, and folders of loggers that keep their files elsewhere
        self._above: list[Path] = []  # parent folders that had to be made
        self._in_use = False  # whether the run has done anything that should be kept

    def keep(self, *given: Any, **named: Any) -> None:
        """Keep the folder, whatever it contains: something has been done in it, or the user is told to continue from there."""
        self._in_use = True

    on_train_batch_end = on_validation_end = on_test_end = on_predict_batch_end = keep

    def claim(self, trainer: Trainer) -> Path:
        """Make the folder. All processes must call this together."""
        answer: Any = None
        if trainer.is_global_zero:
            try:
                self._own, version = _taken_over(trainer.loggers) or _new_folders(trainer, self._above)
                answer = (self._own[0], version)
            except OSError as error:  # the other processes wait for an answer
                _remove_empty(self._above)
                answer = _cannot_be_made(trainer, error)
        answer = trainer.strategy.broadcast(answer)
        if isinstance(answer, str):
            raise ConfigError(answer)
        self.path, version = answer
        write_into_version(trainer.loggers, version)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.path / "checkpoints")
        return self.path

    def give_back(self) -> None:
        """Remove the folder if the run ended before it did anything, and the folder's content can quickly be made again."""
        if self.path is None or self._in_use or not self.path.is_dir():
            return
        if all(_is_no_work(path.relative_to(folder), path.is_dir()) for folder in self._own for path in folder.rglob("*")):
            for folder in self._own:
                shutil.rmtree(folder, ignore_errors=True)
            _remove_empty(self._above)


def check_run_folder(trainer: Trainer) -> None:
    """Check that this run's folders can be made and written to, before anything takes long; all are removed again.

    This does not communicate with other ranks.
    """
    if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
        return
    try:
        for parent in _parents(trainer)[0]:
            _try_out(parent)
    except OSError as error:
        raise ConfigError(_cannot_be_made(trainer, error)) from error
    given = (callback.dirpath for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint))
    try:
        for folder in given:
            if folder is not None and "://" not in str(folder):
                _try_out(Path(folder))
    except OSError as error:
        raise ConfigError(
            f"the checkpoints' folder cannot be made or written to: {error}; give --checkpoint.dirpath=FOLDER another one, or "
            "null for one in the run folder"
        ) from error


def run_folder(trainer: Trainer) -> Path | None:
    """The folder for the files of this run; None under `fast_dev_run`, which writes nothing.

    The first call makes the folder, and all processes must make it together. Under our Trainer, Lightning makes this call before
    anything is set up; under Lightning's own Trainer, the first `setup` hook makes it. Later calls do not communicate.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    holder = find_callback(trainer, RunFolder)
    if holder is None:
        trainer.callbacks.append(holder := RunFolder())  # type: ignore[attr-defined]
    return holder.path or holder.claim(trainer)


def known_folder(trainer: Trainer) -> Path | None:
    """The folder of this run if it exists; this does not make one, and does not communicate with other ranks."""
    holder = find_callback(trainer, RunFolder)
    return None if holder is None else holder.path


def find_callback(trainer: Trainer, kind: type[_C]) -> _C | None:
    """The Trainer's first callback of a class, or None."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)  # type: ignore[attr-defined]


def _parents(trainer: Trainer) -> tuple[list[Path], Version | None]:
    """The parents of this run's folders, the first logger's first, and the version that was given, if any."""
    root = Path(trainer.default_root_dir)
    root = Path("runs") if root == Path.cwd() else root
    own = [logger for number, logger in enumerate(trainer.loggers) if number == 0 or keeps_files_in_a_version(logger)]
    parents = list(dict.fromkeys(logger_root(logger, fallback=root) for logger in own))
    version = next((version for logger in own if (version := given_version(logger)) not in (None, "")), None)
    return parents or [root / "default" if root == Path("runs") else root], version


def _new_folders(trainer: Trainer, made: list[Path]) -> tuple[list[Path], Version]:
    """Make folders of one version: the run folder, and one for each logger elsewhere. New parents are added to `made`."""
    parents, asked = _parents(trainer)
    for parent in parents:
        _make(parent, made)
    for name, version in _names(asked, parents):
        new: list[Path] = []
        with suppress(FileExistsError):
            while len(new) < len(parents):
                folder = parents[len(new)] / name
                _make(folder.parent, made)
                with suppress(FileNotFoundError):  # another run that did nothing has removed the empty parent folder
                    folder.mkdir()
                    new.append(folder)
            return new, version
        _remove_empty(new)
    raise AssertionError("there is no last name")


def _make(folder: Path, made: list[Path]) -> None:
    """Make a folder and its parents; those that did not exist are added to `made`."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        with suppress(FileExistsError):  # another run may have made it in the meantime
            path.mkdir()
            made.append(path)
    folder.mkdir(exist_ok=True)  # raises if a file has this name


def _try_out(folder: Path) -> None:
    """Make a folder, write something into it, and remove everything again."""
    made: list[Path] = []
    try:
        _make(folder, made)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
    finally:
        _remove_empty(made)


def _remove_empty(made: list[Path]) -> None:
    """Remove the empty folders among these, last one first."""
    for folder in reversed(made):
        with suppress(OSError):
            folder.rmdir()


def _cannot_be_made(trainer: Trainer, error: OSError) -> str:
    option = "--trainer.logger.save_dir" if trainer.loggers else "--trainer.default_root_dir"
    return f"the run folder cannot be made or written to: {error}; give another place by {option}=FOLDER"


def _is_no_work(path: Path, is_folder: bool) -> bool:
    """Whether losing this entry of a run folder costs nothing: config, logs, a plan, empty folders."""
    if is_folder:
        return path.name == "checkpoints"
    return any(path.match(name) for name in (*_LOGS, "config.yaml", "plan.json", "plan.png"))


def _names(asked: Version | None, parents: Iterable[Path]) -> Iterator[tuple[str, Version]]:
    """Possible names of the folder: first the given version, then with numbers, as Lightning names its checkpoints."""
    if isinstance(asked, str):
        yield asked, asked
        yield from ((name := f"{asked}-v{number}", name) for number in itertools.count(1))
    if asked is not None:
        yield f"version_{asked}", asked
    found = (re.fullmatch(r"version_(\d+)", path.name) for parent in parents for path in parent.iterdir())
    first = max((int(match[1]) + 1 for match in found if match), default=0)
    yield from ((f"version_{number}", number) for number in itertools.count(first))


def _taken_over(loggers: list[Logger]) -> tuple[list[Path], Version] | None:
    """The folder that the first logger has made, if it contains only a log; with other content it may be another run's."""
    if not loggers or not keeps_files_in_a_version(loggers[0]) or not has_begun(loggers[0]):
        return None
    version = given_version(loggers[0])
    assert version is not None
    folder = logger_root(loggers[0], fallback=Path()) / (version if isinstance(version, str) else f"version_{version}")
    if folder.is_dir() and all(any(path.match(log) for log in _LOGS) for path in folder.iterdir()):
        with suppress(FileExistsError):
            (folder / "checkpoints").mkdir()  # succeeds for only one of two runs with loggers that share a folder
            return [folder], version
    return None
