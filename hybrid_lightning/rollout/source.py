"""What the loader asks of the policy."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from hybrid_lightning.types import PolicyBatch, Prompt, Sequences

DrawPrompts = Callable[[int], Sequence[Prompt]]


class RolloutSource(Protocol):
    """Makes rollouts, and what the update of each has to know beforehand."""

    def roll_out(
        self, prompts: Sequence[Prompt], generator: torch.Generator, draw_more: DrawPrompts | None = None
    ) -> tuple[Sequences, Tensor, Tensor, dict[str, float]]:
        """Complete and score prompts.

        Args:
            prompts: Of this rank: number `rank` of the rollout's and then each `world_size`-th.
            generator: In the same state on every rank, and to be left so.
            draw_more: Draws this rank's part of so many prompts that come next in the order; all ranks draw the same number. None
                if the rollout has to be of `prompts`.

        Returns:
            Sequences (B), the sampler's log-probabilities [B, T], advantages [B], and metrics to log with each of their steps. B
            is G times the number of `prompts`, whatever else was sampled.
        """
        ...

    def takes_part(self, advantages: Tensor) -> Tensor:
        """[B] bool: the rows that an update needs."""
        ...

    def add_logprobs(self, batches: Sequence[PolicyBatch], on_policy: bool) -> list[PolicyBatch]:
        """Fill in what is known of the micro-batches of one optimizer step before it begins.

        That is `old_logprobs` (unless the step is exactly on-policy), and `ref_logprobs` and `policy_mask` (if they are needed).
        All ranks call it together.
        """
        ...
