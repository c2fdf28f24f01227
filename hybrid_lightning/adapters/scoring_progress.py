"""Save the progress of scoring in a folder, so that scoring that was stopped can be resumed.

    settings.json    what the scores depend on
    NAME.pt          what is made before the first loss, such as completions and rewards of calibration prompts
    gradients.pt     sums of gradients over the losses so far, while there are modules without a score
    scores.json      module name -> score

This file needs only torch.
"""

import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from hybrid_lightning.errors import CheckpointError, one_line
from hybrid_lightning.stopping import StopSignals

SCORING = "scoring"  # name of the folder, inside the run folder
FORMAT = 1  # of the files; a folder of another one is refused
SETTINGS = "settings.json"  # written before anything else
_GRADIENTS, _SCORES = "gradients.pt", "scores.json"
# Sums of gradients can be as large as the modules. They are written when the run is stopped, and before that at most every
# _EVERY_S seconds, and less often where writing would take more than _SHARE of the time.
_EVERY_S, _SHARE = 300.0, 0.05


def is_scoring(path: str | Path) -> bool:
    """Whether a folder holds saved progress of scoring."""
    return (Path(path) / SETTINGS).is_file()


class ScoringProgress:
    """Progress of scoring, saved in a folder as it is made.

    Args:
        folder: Folder to save in; None saves nothing.
        earlier: Folder that a stopped run saved in, to resume from; it is not changed. None starts from nothing.
        signals: Signals that stop the run; None for a run that no signal stops.

    Raises:
        CheckpointError: If `earlier` cannot be read, or has another format.
    """

    def __init__(self, folder: Path | None = None, earlier: Path | None = None, signals: StopSignals | None = None) -> None:
        self.folder, self.signals = folder, signals or StopSignals()
        self._source = earlier  # folder to read from
        self._settings: dict[str, Any] = self._read(SETTINGS) or {"format": FORMAT}
        if self._settings.get("format") != FORMAT:
            raise CheckpointError(
                f"{earlier} has format {self._settings.get('format')}, and this version reads {FORMAT}; go on with the version "
                "that wrote it, or start a new run without ckpt_path"
            )
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(earlier.iterdir()) if earlier is not None else ():
                _link(file, folder / file.name)
            self._source = folder
        self.scores: dict[str, float] = self._read(_SCORES) or {}
        self._next_save = time.monotonic() + _EVERY_S

    def require(self, settings: Mapping[str, Any]) -> None:
        """Record settings that the scores depend on, name -> plain value, and compare them with those of the saved progress.

        Raises:
            CheckpointError: If the saved progress was made with another value.
        """
        plain = json.loads(json.dumps(settings, sort_keys=True, default=str))
        for name, value in plain.items():
            if self._settings.get(name, value) != value:
                raise CheckpointError(
                    f"{self._source} was found with {name}={_brief(self._settings[name])}, but it is {_brief(value)} now; "
                    "give the same, or start a new run without ckpt_path"
                )
        self._settings |= plain
        self._write_json(SETTINGS, self._settings)

    def recall(
        self, names: Sequence[str], make: Callable[[Sequence[str]], Sequence[dict[str, Any]]]
    ) -> dict[str, dict[str, Any]]:
        """Load what was saved under these names; make what is missing, plain data and tensors, and save it as NAME.pt."""
        found = {name: saved for name in names if (saved := self._read(f"{name}.pt")) is not None}
        if missing := [name for name in names if name not in found]:
            for name, state in zip(missing, make(missing), strict=True):
                found[name] = state
                self._write(f"{name}.pt", partial(torch.save, state))
        return found

    def sums(self) -> dict[str, Any] | None:
        """The sums that `keep_sums` saved last; None if there are none."""
        return self._read(_GRADIENTS)

    @property
    def is_due(self) -> bool:
        """Whether the last save of sums is long enough ago."""
        return time.monotonic() > self._next_save

    def keep_sums(self, make: Callable[[], dict[str, Any]], stopped: bool = False) -> None:
        """Save sums of gradients, plain data and tensors, if the last save is long enough ago or the run is being stopped."""
        begin = time.monotonic()
        if stopped or self.is_due:
            self._write(_GRADIENTS, lambda path: torch.save(make(), path))
            now = time.monotonic()
            self._next_save = now + max(_EVERY_S, (now - begin) / _SHARE)

    def keep_scores(self, scores: Mapping[str, float], last: bool = False) -> None:
        """Add scores to the saved ones; after the last ones the sums of gradients are no longer needed."""
        self.scores = {**self.scores, **scores}
        self._write_json(_SCORES, self.scores)
        if last and self.folder is not None:
            (self.folder / _GRADIENTS).unlink(missing_ok=True)

    def _read(self, name: str) -> dict[str, Any] | None:
        """What was saved under a name; None if nothing was."""
        path = None if self._source is None else self._source / name
        if path is None or not path.is_file():
            return None
        is_json = path.suffix == ".json"
        try:
            found: dict[str, Any] = json.loads(path.read_text("utf-8")) if is_json else torch.load(path, "cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
            remedy = "start a new run without ckpt_path" if is_json else "remove it, so that it is made again"
            raise CheckpointError(f"{path} cannot be read, as if it were damaged ({one_line(error)}); {remedy}") from error
        return found

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        self._write(name, lambda path: path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file completely or not at all; if that fails, warn and go on, since scoring itself needs none of the files."""
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
                    f"{self.folder / name} could not be written ({error}); scoring goes on, but were it stopped it would have to "
                    "be made again",
                    stacklevel=2,
                )


def _link(file: Path, place: Path) -> None:
    """Hard-link a saved file into a new folder: safe, since saved files are replaced but never changed in place."""
    if file.name.startswith("."):
        return
    try:
        os.link(file, place)
    except OSError:  # on another disk, or where there are no links
        shutil.copyfile(file, place)


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
