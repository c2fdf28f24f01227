"""`PackedSequences`: prompts and completions as one packed sequence, without padding. Every prompt appears once.

    [prompt 1 | prompt 2 | ... | long completions of prompt 1 | long ones of prompt 2 | ... | short ones of prompt 1 | ...]

A completion ends at the token before its last sampled one: later tokens predict nothing. Only attention needs rectangles, which
are cut out by index. Completions of similar length form a *band*, so that the band's rectangle has little padding: the cost of
padding grows with the square of the length. A few filling tokens round the packed sequence up to a multiple of 16. Axes as in
`attention.py`, with N packed tokens. A row is one completion of the batch; a group is a prompt with its completions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from hybrid_lightning.runner.attention import AttentionSettings, Masks, packed_attention, shared_attention
from hybrid_lightning.runner.backend import Backend
from hybrid_lightning.runner.cpu.operators import Groups
from hybrid_lightning.runner.gathering import Grid, Repeated, taken
from hybrid_lightning.runner.segment_attention import GatheredKeys, SegmentLayout, gathered_keys, segment_attention
from hybrid_lightning.types import Sequences


@dataclass(frozen=True)
class _Predictors:
    """Which packed token predicts each of K sampled tokens, in the order of the flattened `sampled_mask`."""

    numbers: Tensor  # [K]: the packed token that predicts each sampled token
    predicted: Tensor  # [N]: the sampled token that each packed token predicts; arbitrary where it predicts none or several
    valid: Tensor  # [N] bool: whether it predicts exactly one
    firsts: Repeated  # a prompt's last token predicts the first token of each of its completions


# The packed sequence is filled up to a multiple of this, so that products have few different sizes: oneDNN compiles up to 0.6 MB
# of code for each new size, and keeps it.
MULTIPLE = 16
# A band holds completions down to this share of its longest one. A new band must also save this many tokens per row.
_BAND_SHARE, _BAND_STEP = 0.7, 16


class PackedSequences:
    """The layout of one packed forward pass; a `Packing`.

    Args:
        sequences: B rows. Neighbours with the same prompt share it.
        backend: The model's backend.
        completions: Whether to pack completions as well; False packs only the prompts, one per row.
        segments: Whether tokens attend by segments. These need no rectangles, so all completions form one band.
    """

    def __init__(self, sequences: Sequences, backend: Backend, completions: bool = True, segments: bool = False) -> None:
        self.backend, self.segments = backend, segments
        first = begins_group(sequences) if completions else torch.ones_like(sequences.prompt_mask[:, 0])
        group = first.long().cumsum(0) - 1
        prompt_mask = sequences.prompt_mask[first]
        prompt_lengths = prompt_mask.sum(dim=1)
        device = first.device
        width = int(prompt_lengths.max())
        self.prompts = Grid.of(torch.arange(width, device=device)[None] < prompt_lengths[:, None])
        ids = [sequences.prompt_ids[first][prompt_mask]]
        positions = [self.prompts.valid.cumsum(dim=1)[self.prompts.valid] - 1]
        self.prompt_tokens = len(ids[0])
        self.last_prompt_token = prompt_lengths.cumsum(0) - 1  # [P], indices of packed tokens
        self.bands: list[Grid] = []
        self.predictors: _Predictors | None = None  # set if completions are packed
        begin = self.prompt_tokens
        if completions:
            counts = group.bincount()
            most = int(counts.max())
            mask = sequences.sampled_mask
            number = (mask.flatten().cumsum(0).view_as(mask) - 1).clamp(min=0)  # [B, T]: index among sampled tokens
            last = (mask * torch.arange(mask.shape[1], device=device)).amax(dim=1)  # [B]: place of the last sampled token
            predictor = torch.zeros_like(number)  # [B, T]: index of the packed token that predicts it
            predictor[:, :1] = self.last_prompt_token[group][:, None]
            predicted, predicts = [number.new_zeros(self.prompt_tokens)], [mask.new_zeros(self.prompt_tokens)]
            for row_of_cell, valid in _bands(group, counts, most, last, one=segments):
                prompt, rank, time = valid.nonzero(as_tuple=True)
                row = row_of_cell[prompt, rank]
                self.bands.append(Grid.of(valid))
                ids.append(sequences.completion_ids[row, time])
                positions.append(prompt_lengths[prompt] + time)
                predictor[row, time + 1] = torch.arange(begin, begin + len(row), device=device)
                predicted.append(number[row, time + 1])
                predicts.append(mask[row, time + 1])
                begin += len(row)
        self.filling = -begin % MULTIPLE
        ids.append(ids[0][:1].expand(self.filling))
        positions.append(positions[0][:1].expand(self.filling))
        self.ids = torch.cat(ids)  # [N]
        self.positions = torch.cat(positions)  # [N]
        self._masks: dict[tuple[int, int | None], Masks] = {}
        if completions:
            predicted.append(number.new_zeros(self.filling))
            predicts.append(mask.new_zeros(self.filling))
            cell = (group, torch.arange(len(group), device=device) - (counts.cumsum(0) - counts)[group])
            firsts, there = number.new_zeros(len(counts), most), mask.new_zeros(len(counts), most)
            firsts[cell], there[cell] = number[:, 0], mask[:, 0]
            shared = Repeated(self.last_prompt_token, firsts, there)
            self.predictors = _Predictors(predictor[mask], torch.cat(predicted), torch.cat(predicts), shared)

    def predicting(self, hidden: Tensor) -> Tensor:
        """Select from all states [N, H] those [K, H] that predict the K sampled tokens, in the order of `sampled_mask`."""
        of = self.predictors
        assert of is not None, "packed prompts predict no completion tokens"
        return taken(hidden, of.numbers, of.predicted, of.valid, of.firsts)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """Attend to the prompt and the tokens before, by segments or an operator where available."""
        if self.segments and settings.fits_segments(query, key, value):
            return segment_attention(query, key, value, self.layout, self._gathered(settings.window), settings)
        if settings.has_operator(self.backend, query, key, value):
            return packed_attention(query, key, value, self.groups, settings.window, settings.factor(query))
        heads, (tokens, all_heads, _), window = key.shape[1], query.shape, settings.window
        grouped = query.view(tokens, heads, all_heads // heads, query.shape[2])
        sizes = [self.prompt_tokens, *(len(band.to_packed) for band in self.bands), self.filling]
        queries, keys, values = (part.split(sizes) for part in (grouped, key, value))
        rows, shared = [], None
        for number, grid in enumerate((self.prompts, *self.bands)):
            cells = (grid.shape[0], -1, grid.shape[-1])  # [P, G, T], where prompts have G = 1
            query_grid, *own = (grid.cut(part[number]) for part in (queries, keys, values))
            query_grid = query_grid.reshape(*cells, *query_grid.shape[-3:]).permute(0, 3, 1, 4, 2, 5)  # [P, K, G, R, T, D]
            # [P, K, G, T, D]
            key_grid, value_grid = (part.reshape(*cells, *part.shape[-2:]).permute(0, 3, 1, 2, 4) for part in own)
            mask = self._mask(number, window)
            result = shared_attention(query_grid, shared, (key_grid, value_grid), mask, settings, self.backend)
            rows.append(grid.paste(result.permute(0, 2, 4, 1, 3, 5).reshape(*grid.shape, *grouped.shape[1:])))
            shared = shared or (key_grid[:, :, 0], value_grid[:, :, 0])
        rows.append(rows[0].new_zeros(self.filling, *rows[0].shape[1:]))
        return torch.cat(rows).flatten(1, 2).view(query.shape)

    @cached_property
    def layout(self) -> SegmentLayout:
        """The segments of prompts and completions."""
        completions = self.bands[0].lengths if self.bands else None
        return SegmentLayout.of(self.prompts.lengths, completions, self.prompts.shape[1])

    @cached_property
    def gathered(self) -> GatheredKeys:
        """The keys of completions, gathered, for layers whose window hides keys of prompts."""
        return gathered_keys(self.prompts.lengths, self.bands[0].lengths, self.layout)

    def _gathered(self, window: int | None) -> GatheredKeys | None:
        hides = window is not None and window < self.layout.width + self.layout.length
        return self.gathered if hides and self.bands else None

    @cached_property
    def groups(self) -> Groups:
        """Each prompt and its completions as segments of the packed sequence; the filling tokens are one more group."""
        prompts = torch.arange(len(self.prompts.lengths), device=self.ids.device)
        filling = prompts.new_tensor([self.filling])
        lengths = torch.cat([self.prompts.lengths, *(band.lengths.flatten() for band in self.bands), filling])
        group = [prompts, *(prompts.repeat_interleave(band.shape[1]) for band in self.bands), prompts[-1:] + 1]
        numbers = torch.cat(group)
        ends = lengths.cumsum(0)
        segments = torch.stack([ends - lengths, ends], dim=1)[numbers.argsort(stable=True)]
        return Groups(segments, torch.cat([filling.new_zeros(1), numbers.bincount().cumsum(0)]))

    def _mask(self, part: int, window: int | None) -> Masks:
        if (part, window) not in self._masks:
            masks = self._completion_masks(self.bands[part - 1].shape[2], window) if part else self._prompt_masks(window)
            self._masks[part, window] = masks
        return self._masks[part, window]

    def _prompt_masks(self, window: int | None) -> Masks:
        """Causal masks of the prompts. They also hide the padding, since it is on the right."""
        index = torch.arange(self.prompts.shape[1], device=self.ids.device)
        return Masks(own=visible(index[:, None], index, window))

    def _completion_masks(self, length: int, window: int | None) -> Masks:
        device, width = self.ids.device, self.prompts.shape[1]
        steps = torch.arange(length, device=device)
        own = visible(steps[:, None], steps, window)
        if self.prompts.filled and (window is None or window >= width + length):
            return Masks(own=own)
        lengths = self.prompts.lengths[:, None, None]
        prompt = torch.arange(width, device=device)[None, None]
        seen = visible(lengths + steps[:, None], prompt, window) & (prompt < lengths)  # [P, T, S]
        return Masks(seen[:, None, None, None], own)


def _bands(group: Tensor, counts: Tensor, most: int, lengths: Tensor, one: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut completions into bands.

    Args:
        group: Prompt index of each of B rows, ascending.
        counts: Rows of each prompt.
        most: The largest count.
        lengths: Tokens to read of each row, [B].
        one: Whether to make only one band.

    Yields:
        The row in each cell [P, G], with G rows per prompt in this band, and a mask of its tokens [P, G, T].
    """
    order = lengths.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]  # by prompt, then the longest first
    prompts = group[order]
    rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[prompts]
    # A column of the rectangle is the n-th longest completion of every prompt.
    longest = lengths.new_zeros(most).scatter_reduce(0, rank, lengths[order], "amax").tolist()
    for begin, end in [(0, most)] if one else _cut(longest):
        inside = (rank >= begin) & (rank < end)
        row_of_cell = order.new_zeros(len(counts), end - begin)
        tokens = lengths.new_zeros(len(counts), end - begin)
        cell = (prompts[inside], rank[inside] - begin)
        row_of_cell[cell], tokens[cell] = order[inside], lengths[order[inside]]
        if longest[begin]:
            yield row_of_cell, torch.arange(longest[begin], device=order.device) < tokens[..., None]


def _cut(lengths: list[int]) -> Iterator[tuple[int, int]]:
    """Begin and end of each band, for descending lengths."""
    begins = [0]
    for place, length in enumerate(lengths):
        first = lengths[begins[-1]]
        if length <= _BAND_SHARE * first and first - length >= _BAND_STEP:
            begins.append(place)
    return pairwise([*begins, len(lengths)])


def similar_lengths(lengths: Tensor) -> list[Tensor]:
    """Group rows with these lengths [B] into bands; returns the rows of each band, ascending."""
    order = lengths.argsort(descending=True, stable=True)
    return [order[begin:end].sort().values for begin, end in _cut(lengths[order].tolist())]


def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Whether a query sees a key, by position: keys up to the query's own position, limited to the last `window`."""
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


def begins_group(sequences: Sequences) -> Tensor:
    """[B] bool: True where a row's prompt differs from the previous row's."""
    prompts = torch.cat([sequences.prompt_ids, sequences.prompt_mask.long()], dim=1)
    changes = (prompts[1:] != prompts[:-1]).any(dim=1)
    return torch.cat([changes.new_ones(1), changes])
