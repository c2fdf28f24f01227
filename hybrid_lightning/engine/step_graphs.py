"""CUDA graphs of decoding steps: whether they may be used (`Graphs`), and one of them (`StepGraph`)."""

import logging
from collections.abc import Callable

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

    def compare(self, replayed: Tensor, plain: Tensor) -> None:
        """Learn from the logits of a step, [R, V]."""
        if not torch.equal(replayed, plain):
            self.give_up("a replayed step gave other logits than the step itself")
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
    """

    def __init__(self, step: Callable[[Tensor], Tensor], tokens: Tensor) -> None:
        self._tokens, self._graph = tokens, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):  # which computes nothing yet
            self._result = step(tokens)

    def replay(self, tokens: Tensor) -> Tensor:
        """Take the step with these tokens, [R]."""
        self._tokens.copy_(tokens)
        self._graph.replay()
        return self._result
