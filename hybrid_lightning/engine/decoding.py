"""`Decoding`: how the sampler goes through a model token by token: one way for every model, and faster ones for packed models."""

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hybrid_lightning.engine.passes import base_model, last_logits, position_ids
from hybrid_lightning.engine.segment_decoding import SegmentDecoding
from hybrid_lightning.engine.shared_decoding import SharedPromptDecoding

if TYPE_CHECKING:
    from hybrid_lightning.engine.engine import Engine  # with PEFT, which is slow to import


class Decoding(Protocol):
    """A model with the keys and values of all tokens that it has read so far."""

    leave_together: float  # rows that have ended leave in multiples of this share of the first batch, since `select` is slow

    def prefill(self, samples: int) -> Tensor:
        """Read the P prompts; returns logits [B, V] of the first token of B = P * samples rows."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Read a token of every row, [B]; returns logits [B, V] of the next."""
        ...

    def select(self, rows: Tensor) -> None:
        """Go on with these rows alone, in ascending order."""
        ...


class RepeatedCacheDecoding:
    """`Decoding` for any model with transformers' cache: each prompt is read once, and its cache is repeated for its completions.

    Args:
        model: Causal language model.
        ids: Prompts [P, S], left-padded.
        mask: [P, S] bool.
    """

    leave_together = 0.25  # re-indexing the cache costs about one decoding step

    def __init__(self, model: nn.Module, ids: Tensor, mask: Tensor) -> None:
        self.model, self.ids, self.mask = model, ids, mask
        self.cache = DynamicCache(config=base_model(model).config)  # of the right kind for each layer

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


def decoding_of(engine: "Engine", ids: Tensor, mask: Tensor, max_new_tokens: int) -> Decoding:
    """The fastest way to decode completions of some prompts.

    Args:
        engine: Engine of the model.
        ids: Prompts [P, S], left-padded.
        mask: [P, S] bool.
        max_new_tokens: Longest completion.
    """
    engine.prepare()
    if not engine.packs:
        return RepeatedCacheDecoding(engine.model, ids, mask)
    return packed_decoding(engine, ids, mask, max_new_tokens)


def packed_decoding(engine: "Engine", ids: Tensor, mask: Tensor, max_new_tokens: int) -> SegmentDecoding | SharedPromptDecoding:
    """The same for a model that can be packed."""
    by_segments = engine.decodes_by_segments(ids.shape[1] + max_new_tokens)
    kind = SegmentDecoding if by_segments else SharedPromptDecoding
    return kind(engine, ids, mask, max_new_tokens)
