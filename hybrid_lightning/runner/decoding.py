"""`Decoding`: token-by-token sampling from a model. One implementation fits every model; packed models have faster ones."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hybrid_lightning.runner.padded import decoder_hidden
from hybrid_lightning.runner.passes import base_model, last_logits, position_ids, prepacked_projection
from hybrid_lightning.runner.segment_decoding import SegmentDecoding
from hybrid_lightning.runner.shared_decoding import SharedPromptDecoding

if TYPE_CHECKING:
    from hybrid_lightning.runner.model_runner import ModelRunner  # with PEFT, which is slow to import


class Decoding(Protocol):
    """A model with the keys and values of all tokens that it has read so far."""

    leave_together: float  # `select` is slow: ended rows leave in multiples of this share of the first batch

    @property
    def can_extend(self) -> bool:
        """Whether `extend` is available."""

    def prefill(self, samples: int) -> Tensor:
        """Read the P prompts; returns logits [B, V] of the first token of B = P * samples rows."""

    def step(self, tokens: Tensor) -> Tensor:
        """Read a token of every row, [B]; returns logits [B, V] of the next."""

    def select(self, rows: Tensor) -> None:
        """Continue with these rows only, in ascending order."""

    def extend(self, rows: Sequence[int], kept: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Continue with these R of the B rows, and let each read one or more tokens.

        Args:
            rows: Rows in ascending order. Rows that have left may come back.
            kept: Completion tokens that each row keeps; what it read after its end is dropped.
            tokens: New tokens of each row.

        Returns:
            Logits [R, V] of the next token.
        """


class RepeatedCacheDecoding:
    """`Decoding` with transformers' cache, for any model: each prompt is read once, and its cache is copied per completion.

    The cache includes the states of recurrent layers. For arguments see `decoding_of`.
    """

    leave_together = 0.25  # re-indexing the cache costs about one decoding step

    def __init__(self, runner: "ModelRunner", ids: Tensor, mask: Tensor, keeps_rows: bool = False) -> None:
        self.runner, self.ids, self.mask = runner, ids, mask
        self.project = prepacked_projection(runner.model, runner.backend) if runner.reads_padded else None
        self.cache = DynamicCache(config=base_model(runner.model).config)  # of the right kind for each layer
        self.leave_together = 1.0 if keeps_rows else self.leave_together
        self.rows: Tensor | None = None  # [R], running rows; None for all

    def prefill(self, samples: int) -> Tensor:
        """Read each prompt once, and copy its cache for each of its completions."""
        logits = self._logits(self.ids, position_ids(self.mask)).repeat_interleave(samples, dim=0)
        # `reorder_cache` is the one way to take rows that also works for states of recurrent layers.
        self.cache.reorder_cache(torch.arange(len(self.ids), device=self.ids.device).repeat_interleave(samples))  # type: ignore[arg-type]
        self.mask = self.mask.repeat_interleave(samples, dim=0)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """Read a token of every row; rows that have left keep their places in the cache."""
        if self.rows is None:
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
            return self._logits(tokens[:, None], self.mask.long().sum(1, keepdim=True) - 1)
        return self._read(tokens[:, None], torch.ones_like(tokens[:, None], dtype=torch.bool))

    def select(self, rows: Tensor) -> None:
        """Keep the cache of these rows only."""
        self.cache.reorder_cache(rows)  # type: ignore[arg-type]
        self.mask = self.mask[rows]

    @property
    def can_extend(self) -> bool:
        """False with a window: its layers count columns, including those that a row skips."""
        return all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def extend(self, rows: Sequence[int], kept: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Let rows read several tokens each; a row skips the cache's columns where only others read."""
        device, width, most = self.mask.device, self.ids.shape[1], max(map(len, tokens))
        self.rows = torch.tensor(rows, device=device)
        own = self.mask[self.rows, width:]
        self.mask[self.rows, width:] = own & (own.cumsum(dim=1) <= torch.tensor(kept, device=device)[:, None])
        ids = torch.tensor([[0] * (most - len(part)) + list(part) for part in tokens], device=device)
        sizes = torch.tensor([len(part) for part in tokens], device=device)
        return self._read(ids, torch.arange(most, device=device) >= most - sizes[:, None])

    def _read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Read tokens [R, L] of the running rows; returns their logits [R, V]."""
        columns = self.mask.new_zeros(len(self.mask), ids.shape[1])
        read = columns.long()
        columns[self.rows], read[self.rows] = mask, ids
        self.mask = torch.cat([self.mask, columns], dim=1)
        return self._logits(read, position_ids(self.mask)[:, -ids.shape[1] :])[self.rows]

    def _logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        if self.project is None:
            return last_logits(self.runner.model, ids, self.mask, positions, 1, self.cache)[:, -1]
        with self.runner.backend.in_pass():
            return self.project(decoder_hidden(self.runner.model, ids, self.mask, positions, self.cache)[:, -1])


def decoding_of(runner: "ModelRunner", ids: Tensor, mask: Tensor, max_new_tokens: int, keeps_rows: bool = False) -> Decoding:
    """The fastest way to decode completions of these prompts.

    Args:
        runner: ModelRunner of the model.
        ids: Prompts [P, S], left-padded.
        mask: [P, S] bool.
        max_new_tokens: Longest completion.
        keeps_rows: Whether rows that leave keep their places, so that `extend` can bring them back.
    """
    runner.prepare()
    if not runner.packs:
        return RepeatedCacheDecoding(runner, ids, mask, keeps_rows)
    kind = SegmentDecoding if runner.decodes_by_segments(ids.shape[1] + max_new_tokens) else SharedPromptDecoding
    return kind(runner, ids, mask, max_new_tokens, keeps_rows)
