"""`PackedSequences`: prompts and completions as one row of tokens, without padding and with every prompt once.

    [prompt 1 | prompt 2 | ... | completion 1 of prompt 1 | completion 2 of prompt 1 | ... | completion 1 of prompt 2 | ...]

A completion's last token is left out: nothing is predicted from it. Attention alone needs rectangles; they are cut out of the row
by index there. Axes as in `attention.py`, and N tokens in the row, of which the first L are the prompts'.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybrid_lightning.rollout.attention import AttentionSettings, Masks, shared_attention
from hybrid_lightning.types import Sequences


@dataclass(frozen=True)
class _Grid:
    """Where the tokens of a part of the row lie in a rectangle that is padded on the right."""

    shape: tuple[int, ...]  # of the rectangle, the last axis being the tokens of one sequence
    valid: Tensor  # bool, in that shape
    lengths: Tensor  # tokens of each sequence
    filled: bool  # no padding at all
    to_grid: Tensor  # for each place of the rectangle, flattened, the token that it holds; at padding some other token
    to_row: Tensor  # for each token its place

    @classmethod
    def of(cls, valid: Tensor) -> "_Grid":
        count = int(valid.sum())
        number = valid.flatten().cumsum(0) - 1
        # The token before: a sequence's padding repeats its last token, so that attention finds finite numbers there.
        return cls(
            tuple(valid.shape),
            valid,
            valid.sum(dim=-1),
            count == valid.numel(),
            number.clamp(min=0),
            valid.flatten().nonzero().squeeze(1),
        )

    def cut(self, row: Tensor) -> Tensor:
        """[tokens, ...] -> [*shape, ...]."""
        grid = row if self.filled else _Gather.apply(row, self.to_grid, self.to_row)
        return grid.reshape(*self.shape, *row.shape[1:])

    def paste(self, grid: Tensor) -> Tensor:
        """[*shape, ...] -> [tokens, ...]."""
        row = grid.flatten(0, len(self.shape) - 1)
        return row if self.filled else _Gather.apply(row, self.to_row, self.to_grid, self.valid.flatten())


class _Gather(torch.autograd.Function):
    """`index_select` along the first axis whose backward pass is one as well, rows and places being one to one where it counts.

    The backward pass of `index_select` adds row by row, which on a CPU takes longer than the attention itself.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, inverse: Tensor, valid: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(inverse, valid)
        return values.index_select(0, index)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        inverse, valid = ctx.saved_tensors
        result = gradient.index_select(0, inverse)
        if valid is not None:  # padding got no gradient
            result = result.masked_fill_(~valid.view(-1, *[1] * (result.dim() - 1)), 0)
        return result, None, None, None


class PackedSequences:
    """The layout of one packed forward pass; a `Packing`.

    Args:
        sequences: B rows. Neighbours with the same prompt share it.
        completions: False packs the prompts alone, each by itself.
    """

    def __init__(self, sequences: Sequences, completions: bool = True) -> None:
        first = begins_group(sequences) if completions else torch.ones_like(sequences.prompt_mask[:, 0])
        group = first.long().cumsum(0) - 1
        prompt_mask = sequences.prompt_mask[first]
        prompt_lengths = prompt_mask.sum(dim=1)
        device = first.device
        width = int(prompt_lengths.max())
        self.prompts = _Grid.of(torch.arange(width, device=device)[None] < prompt_lengths[:, None])
        ids = [sequences.prompt_ids[first][prompt_mask]]
        positions = [self.prompts.valid.cumsum(dim=1)[self.prompts.valid] - 1]
        self.prompt_tokens = len(ids[0])
        self.completions: _Grid | None = None
        inputs = sequences.completion_mask[:, 1:]
        starts = prompt_lengths[group]
        if completions and bool(inputs.any()):
            rank = torch.arange(len(group), device=device) - first.nonzero().squeeze(1)[group]  # among the prompt's completions
            valid = torch.zeros(len(prompt_mask), int(rank.max()) + 1, inputs.shape[1], dtype=torch.bool, device=device)
            valid[group, rank] = inputs
            self.completions = _Grid.of(valid)
            ids.append(sequences.completion_ids[:, :-1][inputs])
            positions.append((starts[:, None] + torch.arange(inputs.shape[1], device=device))[inputs])
        self.ids = torch.cat(ids)  # [N]
        self.positions = torch.cat(positions)  # [N]
        self.last_prompt_token = prompt_lengths.cumsum(0) - 1  # [P], numbers in the row
        self._predictors = (sequences.completion_mask, group)
        self._masks: dict[tuple[str, int | None], Masks] = {}

    def predictors(self) -> Tensor:
        """For each completion token, in the order of `completion_mask` flattened, the number of the token that predicts it."""
        mask, group = self._predictors
        numbers = torch.empty(mask.shape, dtype=torch.long, device=mask.device)
        numbers[:, 0] = self.last_prompt_token[group]
        later = mask[:, 1:]
        numbers[:, 1:][later] = torch.arange(self.prompt_tokens, len(self.ids), device=mask.device)
        return numbers[mask]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None, settings: AttentionSettings
    ) -> Tensor:
        """See `Packing`."""
        heads, (tokens, all_heads, _) = key.shape[1], query.shape
        grouped = query.view(tokens, heads, all_heads // heads, query.shape[2])
        cut = self.prompt_tokens
        queries, keys, values = (_split(part, cut) for part in (grouped, key, value))
        prompt = [self.prompts.cut(part)[:, None] for part in (keys[0], values[0])]  # [P, 1, S, K, D]
        own = [part.permute(0, 3, 1, 2, 4) for part in prompt]  # [P, K, 1, S, D]
        query_grid = self.prompts.cut(queries[0])[:, None].permute(0, 3, 1, 4, 2, 5)  # [P, K, 1, R, S, D]
        result = shared_attention(query_grid, None, (own[0], own[1]), self._mask("prompt", window), settings)
        rows = [self.prompts.paste(result.permute(0, 2, 4, 1, 3, 5)[:, 0])]
        if self.completions is not None:
            query_grid = self.completions.cut(queries[1]).permute(0, 3, 1, 4, 2, 5)  # [P, K, G, R, T, D]
            mine = [self.completions.cut(part).permute(0, 3, 1, 2, 4) for part in (keys[1], values[1])]  # [P, K, G, T, D]
            shared = (own[0][:, :, 0], own[1][:, :, 0])
            result = shared_attention(query_grid, shared, (mine[0], mine[1]), self._mask("completion", window), settings)
            rows.append(self.completions.paste(result.permute(0, 2, 4, 1, 3, 5)))
        return torch.cat(rows).flatten(1, 2).view(query.shape)

    def _mask(self, part: str, window: int | None) -> Masks:
        if (part, window) not in self._masks:
            self._masks[part, window] = self._prompt_masks(window) if part == "prompt" else self._completion_masks(window)
        return self._masks[part, window]

    def _prompt_masks(self, window: int | None) -> Masks:
        """Padding on the right is never seen, since it comes later."""
        index = torch.arange(self.prompts.shape[1], device=self.ids.device)
        return None, visible(index[:, None], index, window)

    def _completion_masks(self, window: int | None) -> Masks:
        assert self.completions is not None
        device, length, width = self.ids.device, self.completions.shape[2], self.prompts.shape[1]
        steps = torch.arange(length, device=device)
        own = visible(steps[:, None], steps, window)
        if self.prompts.filled and (window is None or window >= width + length):
            return None, own
        lengths = self.prompts.lengths[:, None, None]
        prompt = torch.arange(width, device=device)[None, None]
        seen = visible(lengths + steps[:, None], prompt, window) & (prompt < lengths)  # [P, T, S]
        return seen[:, None, None, None], own


def _split(part: Tensor, cut: int) -> tuple[Tensor, ...]:
    return part.split([cut, len(part) - cut])


def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which positions of keys a query's position sees: those up to its own, and of these the last `window`."""
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


def begins_group(sequences: Sequences) -> Tensor:
    """[B] bool: True where a row's prompt differs from the row's before."""
    prompts = torch.cat([sequences.prompt_ids, sequences.prompt_mask.long()], dim=1)
    changes = (prompts[1:] != prompts[:-1]).any(dim=1)
    return torch.cat([changes.new_ones(1), changes])
