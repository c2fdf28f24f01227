"""`PredictionWriter`: predictions as JSON lines."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer

from hybrid_lightning.callbacks.display import console, run_folder
from hybrid_lightning.errors import ConfigError


class PredictionWriter(Callback):
    """Writes one line per prompt: its set, index, text and answer, and of its completions the text, what they answer, length in
    tokens, whether they came to an end, rewards (total and parts), and whether they are correct.

    Args:
        path: File to write, replaced if it exists; None takes `predictions.jsonl` in the run folder. With several processes each
            writes its own file, the rank before the suffix.
    """

    def __init__(self, path: str | None = None) -> None:
        if path is not None and Path(path).is_dir():
            raise ConfigError(f"predictions.path={path!r} is a folder; give a file name such as predictions.jsonl")
        self.path = path
        self._file: TextIO | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file before anything is generated."""
        folder = run_folder(trainer)
        path = Path(self.path) if self.path is not None else (folder / "predictions.jsonl" if folder is not None else None)
        if path is None:
            return
        if trainer.world_size > 1:
            path = path.with_suffix(f".rank{trainer.global_rank}{path.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write at once, so that an interrupted run keeps what it has."""
        if self._file is not None and isinstance(outputs, Sequence):
            self._file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in outputs)
            self._file.flush()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the file and say where it is."""
        if self._file is not None:
            console().print(f"Predictions written to {self._file.name}", soft_wrap=True)
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the file."""
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
