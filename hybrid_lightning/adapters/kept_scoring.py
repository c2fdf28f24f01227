"""`KeptScoring`: what scoring has found so far, in a folder, so that a run that was stopped meanwhile need not find it again.

    settings.json    what the scores depend on
    NAME.pt          whatever was made before the first loss, such as completions and rewards of calibration prompts
    gradients.pt     sums over the losses so far, while there are modules without a score
    scores.json      module -> score

This module needs only torch.
"""

import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from hybrid_lightning.errors import CheckpointError
from hybrid_lightning.stopping import StopSignals

SCORING = "scoring"  # of this name in the run folder
SETTINGS = "settings.json"  # in it from the start
_GRADIENTS, _SCORES = "gradients.pt", "scores.json"
# Sums of gradients are as large as the modules: they are written when the run is stopped, and beside so often that it takes no
# more than this share of the time.
_EVERY_S, _SHARE = 300.0, 0.05


def is_scoring(path: str | Path) -> bool:
    """Whether a folder holds what scoring has found."""
    return (Path(path) / SETTINGS).is_file()


class KeptScoring:
    """Keeps what scoring finds, and gives back what has been found.

    Args:
        folder: Where to keep it; None keeps nothing.
        earlier: Folder of a run that was stopped, which stays as it is; None begins anew.
        signals: Those that end the run.

    Raises:
        CheckpointError: If `earlier` cannot be read.
    """

    def __init__(self, folder: Path | None = None, earlier: Path | None = None, signals: StopSignals | None = None) -> None:
        self.folder, self.signals = folder, signals or StopSignals()
        self._source = earlier  # where to read, until there is a folder of this run's own that has all of it
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(earlier.iterdir()) if earlier is not None else ():
                _link(file, folder / file.name)
            self._source = folder
        self._settings: dict[str, Any] = self._read_json(SETTINGS)
        self.scores: dict[str, float] = self._read_json(_SCORES)
        self._next = time.monotonic() + _EVERY_S

    def require(self, settings: Mapping[str, Any]) -> None:
        """Say what the scores depend on.

        Args:
            settings: Name -> plain value.

        Raises:
            CheckpointError: If what is kept was found with another value.
        """
        plain = json.loads(json.dumps(settings, sort_keys=True, default=str))
        for name, value in plain.items():
            if self._settings.get(name, value) != value:
                raise CheckpointError(
                    f"{self._source} was found with {name}={_short(self._settings[name])}, but it is {_short(value)} now: give "
                    "the same, or start a new run without ckpt_path"
                )
        self._settings |= plain
        self._write(SETTINGS, lambda path: path.write_text(json.dumps(self._settings, indent=2) + "\n", encoding="utf-8"))

    def recall(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is kept of this name, or else what is made now, and kept.

        Args:
            name: Of what is kept.
            make: Gives plain data and tensors.
        """
        found = self._read(f"{name}.pt")
        if found is None:
            found = make()
            self._write(f"{name}.pt", lambda path: torch.save(found, path))
        return found

    def sums(self) -> dict[str, Any] | None:
        """The sums that `keep_sums` was given last."""
        return self._read(_GRADIENTS)

    def keep_sums(self, make: Callable[[], dict[str, Any]], stopped: bool = False) -> None:
        """Keep sums of gradients, if it is time to or the run is being stopped.

        Args:
            make: Gives plain data and tensors.
            stopped: Whether there will be no other occasion.
        """
        begin = time.monotonic()
        if stopped or begin > self._next:
            self._write(_GRADIENTS, lambda path: torch.save(make(), path))
            now = time.monotonic()
            self._next = now + max(_EVERY_S, (now - begin) / _SHARE)

    def keep_scores(self, scores: Mapping[str, float], last: bool = False) -> None:
        """Keep scores, those of before included.

        Args:
            scores: Module -> score.
            last: Whether all modules have one, so that sums are needed no more.
        """
        self.scores = {**self.scores, **scores}
        self._write(_SCORES, lambda path: path.write_text(json.dumps(self.scores, indent=2) + "\n", encoding="utf-8"))
        if last and self.folder is not None:
            (self.folder / _GRADIENTS).unlink(missing_ok=True)

    def _read_json(self, name: str) -> dict[str, Any]:
        path = None if self._source is None else self._source / name
        if path is None or not path.is_file():
            return {}
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}): start a new run without ckpt_path") from error
        return found

    def _read(self, name: str) -> dict[str, Any] | None:
        path = None if self._source is None else self._source / name
        if path is None or not path.is_file():
            return None
        try:
            found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
            raise CheckpointError(f"{path} cannot be read, as if it were damaged: remove it, so that it is made again") from error
        return found

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file so that it is there whole or not at all. Scoring itself needs none of them: it goes on without."""
        if self.folder is None:
            return
        part = self.folder / f".{name}.part"
        with self.signals.deferred():
            try:
                write(part)
                part.replace(self.folder / name)
            except (OSError, RuntimeError) as error:  # the latter is torch's
                part.unlink(missing_ok=True)
                warnings.warn(
                    f"{self.folder / name} could not be written ({error}): scoring goes on, but were it stopped it would have to "
                    "be made again",
                    stacklevel=2,
                )


def _link(file: Path, place: Path) -> None:
    """The same content under another name; no file that is kept is ever written again."""
    if file.name.startswith("."):
        return
    try:
        os.link(file, place)
    except OSError:  # on another disk, or where there are no links
        shutil.copyfile(file, place)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
