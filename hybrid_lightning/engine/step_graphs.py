"""CUDA graphs of decoding steps: whether they may be used (`Graphs`), and one of them (`StepGraph`)."""

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

logger = logging.getLogger(__name__)

_TRIED_STEPS = 3  # that are replayed from a graph beside steps as they are


class Graphs:
    """Whether steps of a model may be replayed from CUDA graphs: the first few have to give what plain steps give, to the bit.

    Attributes:
        why_not: Why they may not, in words for the user; empty where they may, or where nothing was tried yet.
        passed: Whether enough steps were tried.
    """

    def __init__(self) -> None:
        self.why_not, self.passed = "", False
        self._alike, self._has_said = 0, False
        self._room: tuple[Any, Any] | None = None  # the stream and the memory that steps are recorded in
        self._last: Any = None  # the graph recorded last: without one torch gives that memory up

    def record(self, step: Callable[[Tensor], Tensor], tokens: Tensor) -> "StepGraph | None":
        """A graph of a step that reads tokens [R]; None where that failed, from which on there are none."""
        try:
            self._room = self._room or (torch.cuda.Stream(tokens.device), torch.cuda.graph_pool_handle())
            recorded = StepGraph(step, tokens, *self._room)
        except RuntimeError as error:  # of many kinds, such as memory that ran out, or a kernel that cannot be recorded
            cause = error.__context__ or error  # that the recording failed is what comes of it
            self.give_up(f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}")
            return None
        self._last = recorded.graph
        return recorded

    def compare(self, replayed: Tensor, plain: Tensor) -> None:
        """Learn from what a step gave, [R, n]."""
        if not torch.equal(replayed, plain):
            self.give_up("a replayed step gave other numbers than the step itself")
            return
        self._alike += 1
        self.passed = self._alike >= _TRIED_STEPS
        if self.passed:
            rank_zero_info(f"tokens are sampled by CUDA graphs: {self._alike} replayed steps gave what the steps themselves give")

    def give_up(self, reason: str) -> None:
        """Let steps be launched kernel by kernel from now on, and say why."""
        self.why_not = reason
        self.say(reason)

    def say(self, reason: str) -> None:
        """Say once why steps are launched kernel by kernel."""
        if self._has_said:
            return
        self._has_said = True
        logger.warning("tokens are sampled without CUDA graphs, which takes longer where there are few rows, since %s", reason)


class StepGraph:
    """A decoding step, recorded once and replayed, so that its kernels are launched together.

    It changes tensors in place and makes its result of them, and of tokens, which `replay` overwrites.

    `torch.cuda.graph` is not used: it gives all unused memory back before each recording, and leaves the process in the stream of
    a recording that fails.
    """

    def __init__(self, step: Callable[[Tensor], Tensor], tokens: Tensor, stream: Any, pool: Any) -> None:
        self._tokens, self.graph = tokens.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            try:
                self.graph.capture_begin(pool, capture_error_mode="thread_local")  # what other threads do is right
                try:
                    self._result = step(self._tokens)  # which computes nothing yet
                finally:
                    self.graph.capture_end()
            except BaseException:
                # Where torch could not end it, its allocator takes it to go on, and would never give unused memory back again.
                with suppress(RuntimeError):
                    torch.cuda.memory._cuda_endAllocateToPool(tokens.device.index, pool)
                    torch.cuda.memory._cuda_releasePool(tokens.device.index, pool)
                raise

    def replay(self, tokens: Tensor) -> Tensor:
        """Take the step with these tokens, [R]."""
        self._tokens.copy_(tokens)
        self.graph.replay()
        return self._result
