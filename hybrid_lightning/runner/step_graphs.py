"""CUDA graphs of decoding steps: `Graphs` decides whether they may be used, `StepGraph` is one recorded step."""

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

logger = logging.getLogger(__name__)

_TRIED_STEPS = 3  # steps that run both ways, replayed and plain, before graphs are trusted


class Graphs:
    """Decides whether a model's steps may be replayed from CUDA graphs: the first few must equal plain steps, to the bit.

    Attributes:
        why_not: Why graphs may not be used, worded for the user; empty where they may, or before the first trial.
        passed: Whether enough steps were tried.
    """

    def __init__(self) -> None:
        self.why_not, self.passed = "", False
        self._alike, self._has_warned = 0, False
        self._room: tuple[Any, Any] | None = None  # the stream and the memory that steps are recorded in
        self._last: Any = None  # the graph recorded last: without one torch gives that memory up

    def record(self, step: Callable[[Tensor], Tensor], tokens: Tensor) -> "StepGraph | None":
        """Record a step that reads tokens [R]. Returns None if recording failed; no step is recorded after that."""
        try:
            self._room = self._room or (torch.cuda.Stream(tokens.device), torch.cuda.graph_pool_handle())
            recorded = StepGraph(step, tokens, *self._room)
        except RuntimeError as error:  # many kinds: out of memory, or a kernel that cannot be recorded
            cause = error.__context__ or error  # the error itself only reports that recording failed
            self.give_up(f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}")
            return None
        self._last = recorded.graph
        return recorded

    def compare(self, replayed: Tensor, plain: Tensor) -> None:
        """Compare the results [R, n] of a replayed and a plain step. One difference ends the use of graphs."""
        if not torch.equal(replayed, plain):
            self.give_up("a replayed step differed from the plain step")
            return
        self._alike += 1
        self.passed = self._alike >= _TRIED_STEPS
        if self.passed:
            rank_zero_info(f"tokens are sampled with CUDA graphs: {self._alike} replayed steps equal the plain steps")

    def give_up(self, reason: str) -> None:
        """Launch steps kernel by kernel from now on, and log why."""
        self.why_not = reason
        self.warn_once(reason)

    def warn_once(self, reason: str) -> None:
        """Log once why steps are launched kernel by kernel."""
        if self._has_warned:
            return
        self._has_warned = True
        logger.warning("tokens are sampled without CUDA graphs, which is slower for few rows: %s", reason)


class StepGraph:
    """A decoding step, recorded once and replayed, so that its kernels are launched together.

    The step changes tensors in place. Its result depends on them and on the tokens, which `replay` overwrites.

    `torch.cuda.graph` is not used: it frees all unused memory before each recording, and a failed recording leaves the process
    in its stream.
    """

    def __init__(self, step: Callable[[Tensor], Tensor], tokens: Tensor, stream: Any, pool: Any) -> None:
        self._tokens, self.graph = tokens.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            try:
                self.graph.capture_begin(pool, capture_error_mode="thread_local")  # other threads may launch what they like
                try:
                    self._result = step(self._tokens)  # recorded, not computed
                finally:
                    self.graph.capture_end()
            except BaseException:
                # If the capture did not end, torch's allocator treats it as running and never frees unused memory again.
                with suppress(RuntimeError):
                    torch.cuda.memory._cuda_endAllocateToPool(tokens.device.index, pool)
                    torch.cuda.memory._cuda_releasePool(tokens.device.index, pool)
                raise

    def replay(self, tokens: Tensor) -> Tensor:
        """Run the step on these tokens, [R]."""
        self._tokens.copy_(tokens)
        self.graph.replay()
        return self._result
