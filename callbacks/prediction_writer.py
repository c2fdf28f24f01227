"""`PredictionWriter`: writes predictions as JSON lines."""

import itertools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer

from hybrid_lightning.callbacks.display import say
from hybrid_lightning.callbacks.run_folder import run_folder
from hybrid_lightning.errors import ConfigError


class PredictionWriter(Callback):
    """Writes one line per prompt: its set, index, text, answer and completions, and the row that it came from as `columns`.

    Each completion, both the one under `greedy` and the ones in lists, has the text, the answer, the length in tokens, whether it
    is finished, the rewards (total and parts), and whether it is correct. With an environment there is one line per episode; the
    greedy episode has no number as `sample`. The line has the messages, how the episode ended, the rewards of each turn and in
    total, and the token ids: which of them were sampled, and with which log-probabilities.

    Args:
        path: A new file; None takes `predictions.jsonl` in the run folder, or `predictions-v1.jsonl` if the Trainer
            predicts again. With several processes each writes its own file, with the rank before the suffix.

    Raises:
        ConfigError: If `path` is a folder, or if it exists when predicting begins.
    """

    def __init__(self, path: str | None = None) -> None:
        if path is not None and Path(path).is_dir():
            raise ConfigError(f"predictions.path={path!r} is a folder; give a file name such as predictions.jsonl")
        self.path = path
        self._file: TextIO | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse files that exist or cannot be written; all processes check all files, so that none waits for another."""
        paths = _of_ranks(Path(self.path), trainer.world_size) if stage == "predict" and self.path is not None else []
        for path in paths:
            if path.exists():
                raise ConfigError(f"predictions.path: {path} exists; give another path, or remove it")
            above = next(folder for folder in path.absolute().parents if folder.exists())
            if not above.is_dir() or not os.access(above, os.W_OK):
                raise ConfigError(f"predictions.path={self.path}: {above} is not a writable folder; give another path")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file before anything is generated."""
        folder, rank = run_folder(trainer), trainer.global_rank
        if self.path is not None:
            path = _of_ranks(Path(self.path), trainer.world_size)[rank]
        elif folder is not None:
            path = new_file(folder, "predictions", trainer)
        else:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("x", encoding="utf-8")

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write immediately, so that an interrupted run keeps what it has."""
        if self._file is not None and isinstance(outputs, Sequence):
            write_lines(self._file, outputs)
            self._file.flush()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the file and print its path."""
        if self._file is not None:
            say(f"Predictions written to {self._file.name}")
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the file."""
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def new_file(folder: Path, name: str, trainer: Trainer) -> Path:
    """`NAME.jsonl` in a folder, or `NAME-v1.jsonl` and so on if that exists; with several processes each has its own file."""
    versions = itertools.chain([""], (f"-v{number}" for number in itertools.count(1)))
    paths = (_of_ranks(folder / f"{name}{version}.jsonl", trainer.world_size)[trainer.global_rank] for version in versions)
    return next(path for path in paths if not path.exists())


def write_lines(file: TextIO, records: Iterable[Any]) -> None:
    """Write records as JSON, one per line."""
    file.writelines(json.dumps(record, ensure_ascii=False, default=_plain) + "\n" for record in records)


def _plain(cell: Any) -> Any:
    """Convert a table cell that JSON cannot represent: an array to a list, a date or a decimal number to text."""
    return cell.tolist() if hasattr(cell, "tolist") else str(cell)


def _of_ranks(path: Path, world_size: int) -> list[Path]:
    """The file of each process."""
    if world_size == 1:
        return [path]
    return [path.with_suffix(f".rank{rank}{path.suffix}") for rank in range(world_size)]
