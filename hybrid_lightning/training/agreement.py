"""`Agreement`: compares a rollout engine that has its own weights with the policy, on a few fixed tokens.

An engine's weights carry a label, which may be wrong: a broken update can leave the old weights under the new label. So after
each update, both compute the log-probabilities of the same tokens with supposedly the same weights. Sampling and the lag of
rollouts ahead do not affect this comparison, and it also reveals an engine with a bug in its model.

    sampling/mismatch/mean, /max    |l_engine - l_policy| in nats, over the tokens; with several servers, the worst one

The tokens belong to the first completed prompts and their reference answers, which training changes most.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from hybrid_lightning.engine import autocast_dtype, token_logprobs
from hybrid_lightning.errors import RolloutError
from hybrid_lightning.explain import EXPLAIN
from hybrid_lightning.model.policy import Policy
from hybrid_lightning.rollout.batching import pad_left, pad_right
from hybrid_lightning.rollout.interface import PromptLogprobs, WeightsVersion
from hybrid_lightning.rollout.rollout_engine import RolloutEngine
from hybrid_lightning.training.run import Run
from hybrid_lightning.types import Sequences

SEQUENCES, TOKENS = 4, 256  # sequences to compare, and the most tokens of each
_WAIT_S = 60.0  # seconds to wait for an idle engine
_LARGEST = 0.5  # nats, mean over tokens, above which the run stops; wrong weights gave more than 2
# Thresholds of a warning, with products in float32 and in 16 bits. Prompt tokens are improbable, and rounding moves their
# log-probabilities most: 0.06 to 0.09 for SmolLM2 in bfloat16, 1e-5 for a small model in float32.
_DOUBTFUL, _DOUBTFUL_HALF = 1e-3, 0.2


class Agreement:
    """Compares an engine with the policy.

    Args:
        policy: The policy.
        sampler: The engine.
        run: The run that both are part of.

    Attributes:
        metrics: Name -> value of the last comparison; empty before the first one.
    """

    def __init__(self, policy: Policy, sampler: RolloutEngine, run: Run) -> None:
        self._policy, self._sampler, self._run = policy, sampler, run
        self.metrics: dict[str, float] = {}
        self._ids: list[list[int]] = []
        self._own: dict[WeightsVersion, Tensor] = {}  # the policy's values, from the oldest version that may still arrive
        self._asked: Future[list[PromptLogprobs]] | None = None
        self._warned = False

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
            RolloutError: If the two differ by more than half a nat per token.
        """
        if self._asked is not None and not self._asked.done() and waits:
            with self._run.interruptible():
                wait([self._asked], _WAIT_S)
        if self._asked is None or not self._asked.done():
            return
        answers, self._asked = self._asked.result(), None
        differences = {
            answer.engine: (torch.tensor([value for row in answer.logprobs for value in row]) - self._own[answer.version]).abs()
            for answer in answers
            if answer.version in self._own
        }
        for engine, difference in differences.items():
            self._judge(engine, float(difference.mean()))
        if differences:
            worst = max(differences.values(), key=lambda difference: float(difference.mean()))
            self.metrics = {"sampling/mismatch/mean": float(worst.mean()), "sampling/mismatch/max": float(worst.max())}

    def _judge(self, engine: str, mean: float) -> None:
        apart = f"log-probabilities of {engine} differ from the policy's by {mean:.2g} nats per token with the same weights"
        if not mean <= _LARGEST:  # nan, too
            why = (
                "it has another model, or does not support this one; start it with the policy's model, or leave model.sampler out"
            )
            if self.metrics:
                why = "they agreed before, so the last update was incomplete; check the engine's log, and start it again"
            raise RolloutError(f"{apart}: {why}")
        with self._policy.precision():
            most = _DOUBTFUL if autocast_dtype(self._policy.device) is None else _DOUBTFUL_HALF
        if mean > most and not self._warned:
            self._warned = True
            rank_zero_warn(f"{apart}, more than {most:g}; see {EXPLAIN} vllm (the run stops at {_LARGEST:g})")

    def _logprobs(self) -> Tensor:
        """The policy's log-probabilities of all tokens but the first of each sequence."""
        policy = self._policy
        first = pad_left([ids[:1] for ids in self._ids], 0, policy.device)
        rows = Sequences(*first, *pad_right([ids[1:] for ids in self._ids], 0, policy.device))
        with policy.inference():
            logprobs, _ = policy.weights.as_forward(lambda: token_logprobs(policy.engine, rows, 1.0))
        return logprobs[rows.sampled_mask].cpu()
