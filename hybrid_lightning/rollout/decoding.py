"""What the sampler asks of a model while it decodes, and the way that serves every model."""

from typing import Protocol

import torch
from torch import Tensor, nn

from hybrid_lightning.rollout.forward import last_logits, new_cache, position_ids


class Decoding(Protocol):
    """A model with the keys and values of what it has read so far."""

    leave_together: float  # share of the first batch in whose multiples rows that have ended leave: `select` has a price

    def prefill(self, samples: int) -> Tensor:
        """Read the P prompts; returns logits [B, V] of the first token of B = P * samples rows."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Read a token of every row, [B]; returns logits [B, V] of the next."""
        ...

    def select(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        ...


class RepeatedCacheDecoding:
    """Prefill once a prompt, then one cache row a completion; `Decoding` for any model with transformers' cache.

    Args:
        model: Causal language model.
        ids: Prompts [P, S], left-padded.
        mask: [P, S] bool.
    """

    leave_together = 0.25  # re-indexing the cache costs about one decoding step

    def __init__(self, model: nn.Module, ids: Tensor, mask: Tensor) -> None:
        self.model, self.ids, self.mask = model, ids, mask
        self.cache = new_cache(model)

    def prefill(self, samples: int) -> Tensor:
        """See `Decoding`."""
        logits = self._logits(self.ids, position_ids(self.mask)).repeat_interleave(samples, dim=0)
        self.cache.batch_repeat_interleave(samples)
        self.mask = self.mask.repeat_interleave(samples, dim=0)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """See `Decoding`."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        return self._logits(tokens[:, None], self.mask.long().sum(1, keepdim=True) - 1)

    def select(self, rows: Tensor) -> None:
        """See `Decoding`."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]

    def _logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        return last_logits(self.model, ids, self.mask, positions, 1, self.cache)[:, -1]
