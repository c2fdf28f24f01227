"""`SharedPromptDecoding`: decoding with one copy of each prompt's keys and values, read by all its completions together.

Axes as in `attention.py`; a row is one completion. Running rows have *slots* [P, G]. Once completions have ended, prompts have
different numbers of rows; a slot without a row then holds a copy of another row, and its result is ignored. A row that ends
leaves the linear layers immediately. Its slot is released later, together with many others, since that moves all keys and values.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hybrid_lightning.runner.attention import AttentionSettings, Masks, shared_attention
from hybrid_lightning.runner.cpu import operators as kernels
from hybrid_lightning.runner.decoding_base import Added, PackedDecoding
from hybrid_lightning.runner.packing import visible

_FIRST_CAPACITY = 32  # tokens; doubled whenever it is full
_FEWER_SLOTS = 0.6  # slots are released when this share of them is enough
# If attention uses matrix products, their width grows by this many tokens at a time, and tokens not yet decoded are masked.
# oneDNN compiles each product size separately and keeps the code: that would be 0.5 MB for each length of a completion.
_WIDTH_STEP = 16


@dataclass(frozen=True)
class _New:
    """The N tokens of a pass."""

    slots: Tensor  # [N], the slot of each token's row
    counts: Tensor  # [N], completion tokens of its row up to and including it
    places: Tensor | int  # [N], how many of these tokens precede each in its row; the int 0 if none precedes any
    most: int  # T, most of these tokens in one row
    shape: tuple[int, int]  # P, G

    @cached_property
    def cells(self) -> Tensor:
        """[N], each token's index in a flattened rectangle [P, G, T]."""
        return self.slots * self.most + self.places

    @cached_property
    def token_of_cell(self) -> Tensor:
        """[P G T], the token in each cell; the first token in empty cells, where the result is ignored."""
        found = self.slots.new_zeros(self.shape[0] * self.shape[1] * self.most)
        found[self.cells] = torch.arange(len(self.slots), device=found.device)
        return found


class SharedPromptDecoding(PackedDecoding):
    """`Decoding` with keys and values of prompts [P, K, S, D] and of completions [P, K, G, capacity, D]; see `PackedDecoding`."""

    decoded = 0  # tokens in `own` of the longest running row
    counts: Tensor  # [B], tokens in `own` of each row
    own_width = 0  # tokens of `own` that attention receives: decoded ones, then zeros
    shape: tuple[int, int]  # P, G of the slots
    slot_of_row: Tensor  # [B]
    row_lengths: Tensor  # [B], tokens of each row's prompt
    _new: _New
    _masks: dict[int | None, Masks]  # window -> masks of a step

    def prefill(self, samples: int) -> Tensor:
        """Read the prompts as one packed sequence, and make a slot for each completion."""
        logits, prompts, self.samples = self.read_prompts(), len(self.lengths), samples
        self.shape = (prompts, samples)
        self.slot_of_row = torch.arange(prompts * samples, device=self.lengths.device)
        self.counts = torch.zeros_like(self.slot_of_row)
        self._start_rows()
        return logits.repeat_interleave(samples, dim=0)

    def step(self, tokens: Tensor) -> Tensor:
        """Read a token of every row."""
        # A row without space has ended, though it may still be among the running rows.
        self.counts = (self.counts + 1).clamp_(max=self.max_new_tokens)
        self.decoded = min(self.decoded + 1, self.max_new_tokens)
        self._begin(_New(self.slot_of_row, self.counts, 0, 1, self.shape))
        return self.project(self.runner.hidden(tokens, self.row_lengths + self.counts - 1, self))

    def _begin(self, new: _New) -> None:
        self._new, self.own_width, self._masks = new, self.decoded, {}
        if self.runner.backend.is_cpu(self.lengths.device):
            self.own_width = min(-(-self.decoded // _WIDTH_STEP) * _WIDTH_STEP, self.max_new_tokens)

    def select(self, rows: Tensor) -> None:
        """Continue with these rows only. Without `keeps_rows`, slots are released when far fewer are enough."""
        self.slot_of_row, self.counts = self.slot_of_row[rows], self.counts[rows]
        if not self.keeps_rows:
            self._give_up_slots()
        self._start_rows()

    def resume(self, added: Added) -> None:
        """Continue with these rows, each with its tokens so far."""
        self.slot_of_row, self.counts = added.rows, added.counts[added.begins[1:] - 1]
        self._start_rows()
        self.decoded = added.longest
        places = torch.arange(len(added.owner), device=added.owner.device) - added.begins[added.owner]
        self._begin(_New(added.rows[added.owner], added.counts, places, added.most, self.shape))

    def _give_up_slots(self) -> None:
        """Move the running rows together, if that leaves far fewer slots."""
        (prompts, samples), device = self.shape, self.slot_of_row.device
        kept, group = torch.unique_consecutive(self.slot_of_row // samples, return_inverse=True)
        counts = torch.bincount(group)
        most = int(counts.max())
        if len(kept) * most > _FEWER_SLOTS * prompts * samples:
            return
        rank = torch.arange(len(group), device=device) - (counts.cumsum(0) - counts)[group]
        source = self.slot_of_row[:1].expand(len(kept), most).clone()  # the old slot of each new one
        source[group, rank] = self.slot_of_row
        for layer, (keys, values) in self.own.items():
            self.own[layer] = (self._move(keys, source), self._move(values, source))
        # Not in the loop above: if rows end at their first token, no layer has keys of completions yet.
        self.prompt = {layer: (keys[kept], values[kept]) for layer, (keys, values) in self.prompt.items()}
        self.lengths = self.lengths[kept]
        self.shape, self.slot_of_row = (len(kept), most), group * most + rank

    def _move(self, cache: Tensor, source: Tensor) -> Tensor:
        """Take slots from a cache [P, K, G, capacity, D]; `source` [P', G'] has indices into the flattened [P, G]."""
        samples, (_, heads, _, capacity, size) = self.shape[1], cache.shape
        # Indexing puts heads after slots: [P', G', K, tokens, D].
        taken = cache[..., : self.decoded, :][source // samples, :, source % samples]
        moved = cache.new_zeros(len(source), heads, source.shape[1], capacity, size)
        moved[..., : self.decoded, :] = taken.transpose(1, 2)
        return moved

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """Store the new keys and values in their slots, then attend to the prompt's keys and the slot's own."""
        if self._has_operator(settings, query, key, value, *self.prompt[layer]):
            own = self._room(layer, key, value, zeros=False)
            rest = (self._new.slots, self._new.counts, self.lengths, settings.window, settings.factor(query))
            return kernels.decode_attention(query, key, value, self.prompt[layer], own, *rest)
        new, samples, (_, all_heads, size) = self._new, self.shape[1], query.shape
        keys, values = self._room(layer, key, value, zeros=True)
        where = (new.slots // samples, slice(None), new.slots % samples, new.counts - 1)
        keys[where], values[where] = key.to(keys.dtype), value.to(values.dtype)
        shape = (*self.shape, new.most, key.shape[1], all_heads // key.shape[1], size)
        grouped = query.index_select(0, new.token_of_cell).view(shape).permute(0, 3, 1, 4, 2, 5)  # [P, K, G, R, T, D]
        own = (keys[..., : self.own_width, :], values[..., : self.own_width, :])
        result = shared_attention(grouped, self.prompt[layer], own, self._mask(settings.window), settings, self.runner.backend)
        return result.permute(0, 2, 4, 1, 3, 5).reshape(-1, all_heads, size).index_select(0, new.cells)

    def _has_operator(self, settings: AttentionSettings, *tensors: Tensor) -> bool:
        """Whether the operator can compute attention for one new token of every row."""
        known = tensors[0].shape[-1] in kernels.DECODED_HEAD_SIZES
        return known and settings.has_operator(self.runner.backend, *tensors) and not torch.is_grad_enabled()

    def store_prompts(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> None:
        """Keep a layer's keys and values of the prompts, padded, one row per prompt."""
        by_operator = self._has_operator(settings, query, key, value)
        key_dtype = key.dtype if by_operator else self.runner.backend.key_dtype(key)
        tokens = self.layout.prompt_tokens
        keys, values = (self.layout.prompts.cut(part[:tokens]).transpose(1, 2) for part in (key, value))
        self.prompt[layer] = (keys.to(key_dtype).contiguous(), values.contiguous())

    def _start_rows(self) -> None:
        self.row_lengths = self.lengths[self.slot_of_row // self.shape[1]]

    def _room(self, layer: int, key: Tensor, value: Tensor, zeros: bool) -> tuple[Tensor, Tensor]:
        """Keys and values of completions, with space for the new tokens. With `zeros`, unused space is zero, as products need."""
        if layer not in self.own:
            prompts, samples = self.shape
            shape = (prompts, key.shape[1], samples, min(_FIRST_CAPACITY, self.max_new_tokens))
            made = [part.new_empty(*shape, new.shape[2]) for part, new in zip(self.prompt[layer], (key, value), strict=True)]
            self.own[layer] = (made[0], made[1])
            for part in made if zeros else ():
                part.zero_()
        keys, values = self.own[layer]
        if keys.shape[3] < self.own_width:
            extra = max(self.own_width - keys.shape[3], min(keys.shape[3], self.max_new_tokens - keys.shape[3]))
            # One at a time, so that only one of them is in memory twice.
            self.own[layer] = (keys := _grow(keys, extra), values)
            self.own[layer] = (keys, _grow(values, extra))
        return self.own[layer]

    def _mask(self, window: int | None) -> Masks:
        if window not in self._masks:
            self._masks[window] = self._build_masks(window)
        return self._masks[window]

    def _build_masks(self, window: int | None) -> Masks:
        width, device = self.layout.prompts.shape[1], self.lengths.device
        counts = self._new.counts[self._new.token_of_cell].view(*self.shape, self._new.most, 1)
        own = visible(counts - 1, torch.arange(self.own_width, device=device), window)[:, None, :, None]  # [P, 1, G, 1, T, M]
        if self.layout.prompts.filled and (window is None or window >= width + self.decoded):
            return Masks(own=own)
        lengths, prompt = self.lengths[:, None, None, None], torch.arange(width, device=device)
        seen = visible(lengths + counts - 1, prompt, window) & (prompt < lengths)  # [P, G, T, S]
        return Masks(seen[:, None, :, None], own)


def _grow(cache: Tensor, extra: int) -> Tensor:
    return torch.cat([cache, cache.new_zeros(*cache.shape[:3], extra, cache.shape[4])], dim=3)
