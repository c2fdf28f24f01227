"""`Passes`: forward passes of a policy over rows of tokens, in chunks that fit into memory.

Axes: B sequences, T completion tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import Divergence
from hybrid_lightning.model.policy import Policy
from hybrid_lightning.rollout.batching import join_rows, split_by_tokens
from hybrid_lightning.runner import Predictions, accelerator_memory, compared_logprobs, default_token_budget, token_logprobs
from hybrid_lightning.sharding.ranks import gather_counts
from hybrid_lightning.types import Sequences

_PASS_TOKENS = "tokens_of_pass"  # key in a checkpoint

Measured = tuple[Tensor | None, Tensor, Tensor | None]  # see `Passes.measure`


class Passes:
    """Log-probabilities of rows under a policy, with gradient for a loss or without.

    Args:
        policy: The policy.
        temperature: Divides the logits; must equal the sampling temperature.
        max_tokens: Most tokens of a pass; None chooses by the sizes of the model and the memory of the device.
        rows_per_example: This many neighbouring rows are never in different chunks: 2 for the pairs of a preference loss.
        entropy_gradient: Whether entropies have a gradient, as an entropy bonus needs.
        beside: Bytes that another model, such as a teacher, takes beside these passes on an accelerator.

    Raises:
        ConfigError: If `max_tokens` is impossible.
    """

    def __init__(
        self,
        policy: Policy,
        temperature: float = 1.0,
        max_tokens: int | None = None,
        rows_per_example: int = 1,
        entropy_gradient: bool = False,
        beside: Callable[["Passes"], int] = lambda passes: 0,
    ) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise ConfigError(f"model.max_tokens_per_micro_batch must be at least 1, got {max_tokens}")
        self.policy, self.temperature, self.max_tokens = policy, temperature, max_tokens
        self.rows_per_example, self.entropy_gradient = rows_per_example, entropy_gradient
        self._beside = beside
        self._chosen: int | None = None  # tokens per pass chosen for this run, if `max_tokens` is None

    def token_budget(self) -> int:
        """The most tokens that one forward and backward pass of training may take."""
        if self.max_tokens:
            return self.max_tokens
        if self._chosen is None:  # computing it takes as long as one layer of a small policy
            self._chosen = self.current_token_budget()
        return self._chosen

    def current_token_budget(self) -> int:
        """The most tokens of a pass, given the memory of the current weights: for use before the adapter and optimizer exist."""
        return self.max_tokens or default_token_budget(self.policy.model, self.policy.device, partial(self._beside, self))

    def chunks(self, sequences: Sequences) -> list[slice]:
        """Cut rows into chunks; each chunk takes one forward and backward pass."""
        return split_by_tokens(sequences, self.token_budget(), self.rows_per_example)

    def logprobs(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """One pass: log-probabilities with gradient and entropies of completions, [B, T] each."""
        runner, temperature, gradient = self.policy.runner, self.temperature, self.entropy_gradient
        return self.policy.weights.as_forward(lambda: token_logprobs(runner, sequences, temperature, gradient))

    def compared(self, sequences: Sequences, teacher: Predictions, divergence: Divergence) -> tuple[Tensor, ...]:
        """One pass like `logprobs`, with a divergence from a teacher's predictions of the tokens (see `compared_logprobs`)."""
        given = (sequences, teacher, divergence, self.temperature, self.entropy_gradient)
        return self.policy.weights.as_forward(lambda: compared_logprobs(self.policy.runner, *given))

    def idle(self) -> Tensor:
        """The shortest pass, with a loss and a gradient of zero: for a rank without chunks while others still have some."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.policy.device)
        real = torch.ones_like(token, dtype=torch.bool)
        zero: Tensor = self.logprobs(Sequences(token, real, token, real))[0].sum() * 0
        return zero

    def in_chunks(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """`logprobs` of all rows, chunk by chunk as in training, so that training gets exactly the same numbers.

        If ranks make passes together, all of them have to call it, even without rows.
        """
        width, device = sequences.completion_ids.shape[1], self.policy.device
        chunks = self.chunks(sequences) if len(sequences) else []
        idle = max(gather_counts(len(chunks), device)) - len(chunks) if self.policy.weights.sharded else 0
        parts = [self.logprobs(sequences.rows(chunk)) for chunk in chunks]
        for _ in range(idle):
            self.idle()
        if not parts:
            nothing = torch.zeros(0, width, device=device)
            return nothing, nothing
        logprobs, entropies = zip(*parts, strict=True)
        return join_rows(logprobs, width), join_rows(entropies, width)

    def measure(
        self,
        parts: Sequence[Sequences],
        current: bool = True,
        reference: bool = False,
        interruptible: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> list[Measured]:
        """Measure, without gradient, the values that a loss needs beforehand for some rows; all ranks have to call it together.

        Args:
            parts: Rows.
            current: Whether to compute the policy's log-probabilities.
            reference: Whether to compute the start policy's log-probabilities.
            interruptible: Makes a context in which a signal may end the passes; used if no other rank waits for them.

        Returns:
            For each part: the log-probabilities [B, T] of the policy, or None if not requested; their entropies [B, T], or zeros;
            and the log-probabilities of the start policy, or None if not requested.
        """
        policy, together = self.policy, self.policy.weights.sharded

        def measure_one(sequences: Sequences) -> Measured:
            logprobs = start = None
            entropy = torch.zeros(sequences.completion_ids.shape, device=policy.device)
            if len(sequences) or together:
                if current:
                    logprobs, entropy = self.in_chunks(sequences)
                if reference:
                    with policy.start_policy():
                        start, _ = self.in_chunks(sequences)
            return logprobs, entropy, start

        def measure_all() -> list[Measured]:
            with nullcontext() if together else interruptible():
                return [measure_one(sequences) for sequences in parts]

        with policy.inference():
            return policy.weights.as_forward(measure_all)

    # ---- checkpoints

    def state(self, device: torch.device) -> dict[str, Any]:
        """The tokens per pass that were chosen for the device's memory, so that a resumed run splits rows in the same way.

        On a CPU they follow from the model's sizes and are not saved.
        """
        total = accelerator_memory(device)
        return {} if total is None or self._chosen is None else {_PASS_TOKENS: {"tokens": self._chosen, "memory": total}}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore what `state` returned, unless this device is of another kind or has less memory."""
        saved, total = state.get(_PASS_TOKENS), accelerator_memory(device)
        if saved is None or total is None or self.max_tokens:
            return
        if total >= saved["memory"]:
            self._chosen = saved["tokens"]
        else:
            rank_zero_info(
                f"this device has {total / 2**30:.0f} GiB, and the checkpoint's device had {saved['memory'] / 2**30:.0f}: passes "
                "take fewer tokens than before, so sums are rounded differently"
            )
