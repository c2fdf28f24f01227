"""Measures what a run holds at its peaks, part by part; peaks and parts are defined in `hybrid_lightning.memory`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from lightning.pytorch import Callback
from torch import Tensor

from benchmarks.live_tensors import LiveTensors
from benchmarks.processes import forget_peak, resident_bytes
from benchmarks.training import gradient_bytes, optimizer_bytes, tensor_bytes
from hybrid_lightning.runner import SharedPromptDecoding


class MemoryProbe(Callback):
    """Records the largest memory at each moment. It must be the first callback, and `fit` must run inside `measuring`.

    Attributes:
        moments: name -> bytes of `tensors` at their peak, of the `process` and of the `gpu` at theirs, and of each part.
    """

    def __init__(self) -> None:
        self.moments: dict[str, dict[str, int]] = {}
        self.live = LiveTensors()
        self.policy: Any = None
        self.trainer: Any = None
        self._now: str | None = None
        self._start = self._cache = self._kept = 0
        self._in_calibration = False

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Count the tensors that are made within this context."""
        make, resize_storage = SharedPromptDecoding.step, torch.UntypedStorage.resize_

        def step(decoding: SharedPromptDecoding, tokens: Tensor) -> Tensor:
            result = make(decoding, tokens)
            stored = [part for layers in (decoding.prompt, decoding.own) for pair in layers.values() for part in pair]
            self._cache = max(self._cache, sum(part.untyped_storage().nbytes() for part in stored))
            return result

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            """FSDP frees and reallocates the memory of tensors that stay alive."""
            result = resize_storage(storage, size)
            self.live.count_storage(storage)
            return result

        with (
            self.live,
            mock.patch.object(SharedPromptDecoding, "step", step),
            mock.patch.object(torch.UntypedStorage, "resize_", resize),
        ):
            yield

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Hook into the policy, before its modules are scored."""
        self.policy, self.trainer = pl_module, trainer
        self.live.count([*pl_module.parameters(), *pl_module.buffers()])
        task = pl_module.task
        self._replace(task.generation, "begin", self._generate)
        self._replace(task, "chunk_loss", self._chunk_loss)
        self._replace(task, "calibration_losses", self._calibration_losses)
        self._replace(pl_module.policy, "adapt", self._adapt)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._begin("updating")

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Measure when all gradients exist."""
        self._end()
        self._begin("optimizer step")

    def on_train_batch_end(self, *_: Any) -> None:
        self._end()

    def _generate(self, generate: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        evaluating = self.trainer.validating or self.trainer.sanity_checking
        self._begin("calibrating" if self._in_calibration else "validating" if evaluating else "generating")
        result = generate(*arguments, **named)
        self._end()
        return result

    def _chunk_loss(self, loss: Callable[..., Any], *arguments: Any) -> Any:
        before = self.live.bytes
        result = loss(*arguments)
        self._kept = max(self._kept, self.live.bytes - before)
        return result

    def _calibration_losses(self, losses: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        self._in_calibration = True
        result = losses(*arguments, **options)
        self._in_calibration = False
        self._begin("scoring")
        return result

    def _adapt(self, adapt: Callable[..., Any], *arguments: Any) -> None:
        if self._now == "scoring":
            self._end()
        adapt(*arguments)

    def _replace(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        setattr(owner, name, lambda *arguments, **named: function(original, *arguments, **named))

    def _begin(self, name: str) -> None:
        self._now, self._start = name, self.live.bytes
        self._cache = self._kept = 0
        self.live.restart_peak()
        forget_peak()
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()

    def _end(self) -> None:
        if self._now is None:
            return
        found = {
            "tensors": self.live.peak,
            "process": resident_bytes()[1],
            "gpu": torch.cuda.max_memory_allocated(),
            "weights": tensor_bytes(self.policy.parameters()),
            "gradients": gradient_bytes(self.policy),
            "optimizer": optimizer_bytes(self.trainer.optimizers),
            "cache": self._cache,
            "kept": self._kept,
            "added": self.live.peak - self._start,
        }
        known = self.moments.setdefault(self._now, found)
        self.moments[self._now] = {name: max(known[name], value) for name, value in found.items()}
        self._now = None
