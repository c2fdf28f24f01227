"""`Agreement`: compares a rollout engine that has its own weights with the policy, on a few fixed tokens.

An engine's weights carry a label, which may be wrong: a broken update can leave the old weights under the new label. So after
each update, both compute the log-probabilities of the same tokens with supposedly the same weights. Sampling and the lag of
rollouts ahead do not affect this comparison, and it also reveals an engine with a bug in its model.

    sampling/mismatch/mean, /max    |l_engine - l_policy| in nats, over the tokens; with several servers, the worst one

The tokens belong to the first completed prompts and their reference answers, which training changes most.

A difference is judged in two ways. Some levels are wrong for any engine of a precision. And an engine that agreed before and no
longer does has missed an update, long before it reaches such a level if the learning rates are low: training sampled from old
weights ever since. Rounding does not grow by orders of magnitude, as `_LEVELS` explains.
"""

import math
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from hybrid_lightning.errors import RolloutError
from hybrid_lightning.model.loading import DTYPES
from hybrid_lightning.model.policy import Policy
from hybrid_lightning.rollout.batching import pad_left, pad_right
from hybrid_lightning.rollout.interface import PromptLogprobs, WeightsVersion
from hybrid_lightning.rollout.rollout_engine import WeightedEngine
from hybrid_lightning.runner import autocast_dtype, token_logprobs
from hybrid_lightning.shared.explain import EXPLAIN
from hybrid_lightning.training.run import Run
from hybrid_lightning.types import Sequences

SEQUENCES, TOKENS = 4, 256  # sequences to compare, and the most tokens of each
_WAIT_S = 60.0  # seconds to wait for an idle engine
_RISE = 100  # times the lowest level of the run, above which an engine has missed an update
_IN_A_ROW = 3  # comparisons that find such a rise before the run stops


@dataclass(frozen=True)
class _Levels:
    """Differences in nats, means over tokens, that mean something in one precision."""

    risen: float  # least level that counts as a rise, whatever the run's lowest level is
    doubtful: float  # the run warns
    wrong: float  # the run stops


# For engines in float32 (True), with 16 bits on one side, or quantized (False). Rounding moves improbable tokens most,
# and prompts have many. In float32 engines were at 3e-7 to 1e-5, and rose twelvefold in a run that diverged; GPUs that round
# products to TF32 may reach 1e-3. Weights with 15% of noise gave 0.3. In 16 bits engines were at 0.04 to 0.09, and with experts
# may be at 0.2, so only 0.5 is surely wrong: other models gave more than 2.
_LEVELS = {True: _Levels(1e-4, 1e-3, 0.05), False: _Levels(0.2, 0.2, 0.5)}


class Agreement:
    """Compares an engine with the policy.

    Args:
        policy: The policy.
        sampler: The engine.
        run: The run that both are part of.

    Attributes:
        metrics: Name -> value of the last comparison; empty before the first one.
        lowest: Engine -> the lowest mean difference of the run, also of the run that it resumes.
        doubts: Engine -> how far its last comparison was off, in words; only for engines that may not have the policy's weights.
    """

    def __init__(self, policy: Policy, sampler: WeightedEngine, run: Run) -> None:
        self._policy, self._sampler, self._run = policy, sampler, run
        self.metrics: dict[str, float] = {}
        self._ids: list[list[int]] = []
        self._own: dict[WeightsVersion, Tensor] = {}  # the policy's values, from the oldest version that may still arrive
        self._asked: Future[list[PromptLogprobs]] | None = None
        self.lowest: dict[str, float] = {}
        self.doubts: dict[str, str] = {}
        self._rises: dict[str, int] = {}  # engine -> comparisons in a row that found a rise

    def begin(self, sequences: Callable[[], Iterable[list[int]]]) -> None:
        """Begin a comparison if the engine has received weights since the last one. The `sequences` are made only once.

        Ranks that share a model must call this together.
        """
        version, asks = self._sampler.version, self._run.rank == 0 or not self._sampler.is_remote
        if version is None or version in self._own or not (asks or self._policy.weights.sharded):
            return
        self._ids = self._ids or [ids[:TOKENS] for ids in sequences() if len(ids) > 1]
        if not self._ids:
            return
        if self._asked is None:
            self._own = {}
            if asks:
                self._asked = self._sampler.prompt_logprobs(self._ids)
        self._own[version] = self._logprobs()

    def end(self, waits: bool = False) -> None:
        """Compare, if the engine has answered; with `waits`, wait for an idle engine.

        Raises:
            RolloutError: If the two differ by more than rounding can explain.
        """
        if self._asked is not None and not self._asked.done() and waits:
            with self._run.interruptible():
                wait([self._asked], _WAIT_S)
        if self._asked is None or not self._asked.done():
            return
        answers, self._asked = self._asked.result(), None
        differences = [
            (answer, (torch.tensor([value for row in answer.logprobs for value in row]) - self._own[answer.version]).abs())
            for answer in answers
            if answer.version in self._own
        ]
        for answer, difference in differences:
            self._judge(answer, float(difference.mean()))
        if differences:
            worst = max((difference for _, difference in differences), key=lambda difference: float(difference.mean()))
            self.metrics = {"sampling/mismatch/mean": float(worst.mean()), "sampling/mismatch/max": float(worst.max())}

    def _judge(self, answer: PromptLogprobs, mean: float) -> None:
        engine, levels = answer.engine, _LEVELS[answer.in_float32 and self._computes_in_float32]
        lowest = self.lowest.get(engine, math.inf)
        rise = max(_RISE * lowest, levels.risen)
        self._rises[engine] = self._rises.get(engine, 0) + 1 if mean > rise else 0
        apart = f"log-probabilities of {engine} differ from the policy's by {mean:.2g} nats per token with the same weights"
        if not mean <= levels.wrong or self._rises[engine] == _IN_A_ROW:  # nan, too
            raise RolloutError(f"{apart}: {self._why(lowest, levels)}")
        self.lowest[engine] = min(lowest, mean)
        self.doubts.pop(engine, None)
        most = min(rise, levels.doubtful)
        if mean > most:
            self.doubts[engine] = apart
            stops = f"the run stops at {levels.wrong:g}"
            stops += f", or after {_IN_A_ROW} comparisons above {rise:.2g}" if rise < levels.wrong else ""
            # With the step, since Python shows a repeated text only once.
            at = f"{apart} at step {self._run.step}, more than {most:.2g}"
            rank_zero_warn(f"{at}; see {EXPLAIN} vllm ({stops})")

    def _why(self, lowest: float, levels: _Levels) -> str:
        """The cause of a difference that stops the run, and the remedy."""
        if lowest <= levels.doubtful:
            agreed = f"they agreed before, to {lowest:.2g}"
            return f"{agreed}, so it has not taken the weights of the last updates; check the engine's log, and start it again"
        if self._run.is_resumed:
            return (
                "it has not taken the weights that it was sent, or has another model; check the engine's log, and start it again "
                "with the policy's model"
            )
        return "it has another model, or does not support this one; start it with the policy's model, or leave model.sampler out"

    @property
    def _computes_in_float32(self) -> bool:
        policy = self._policy
        with policy.precision():
            return (autocast_dtype(policy.device) or DTYPES[policy.pretrained.dtype]) == torch.float32

    def _logprobs(self) -> Tensor:
        """The policy's log-probabilities of all tokens but the first of each sequence."""
        policy = self._policy
        first = pad_left([ids[:1] for ids in self._ids], 0, policy.device)
        rows = Sequences(*first, *pad_right([ids[1:] for ids in self._ids], 0, policy.device))
        with policy.inference():
            logprobs, _ = policy.weights.as_forward(lambda: token_logprobs(policy.runner, rows, 1.0))
        return logprobs[rows.sampled_mask].cpu()
