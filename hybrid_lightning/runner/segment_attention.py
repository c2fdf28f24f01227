"""Attention by segments over packed prompts and completions, on accelerators. Each prompt's keys and values exist once.

The tokens of a completion see two runs of keys: the prompt's, shared by all its completions, and their own. Each kind of run is
one call (see `segments.py`), and the prompts themselves are a third: three calls per layer, whatever the lengths. If a layer's
window hides some of a prompt's keys, each completion's keys are instead gathered after a copy of the prompt's.

Axes as in `attention.py`, with N packed tokens.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybrid_lightning.runner.attention import AttentionSettings
from hybrid_lightning.runner.backend import autocast_dtype
from hybrid_lightning.runner.gathering import ordered_sums
from hybrid_lightning.runner.segments import Attended, Segments, attend, attend_backward, joined


@dataclass(frozen=True)
class GatheredKeys:
    """For each completion the prompt's keys and then its own, as one run that a window can be applied to."""

    segments: Segments
    index: Tensor  # [M]: for each place, the packed token that the key there belongs to
    own: Tensor  # [completion tokens]: the place of each completion token's key
    repeated: Tensor  # [prompt tokens, G]: the places of each prompt token's key
    there: Tensor  # [prompt tokens, G] bool: a prompt may have fewer completions than others


@dataclass(frozen=True)
class SegmentLayout:
    """The segments of prompts and completions in the layout of `packing.py`."""

    prompt_tokens: int
    completion_tokens: int
    width: int  # tokens of the longest prompt
    length: int  # tokens of the longest completion
    prompts: Segments
    shared: Segments | None  # completions and the keys of their prompts; None where there are none
    own: Segments | None  # completions and their own keys

    @classmethod
    def of(cls, prompts: Tensor, completions: Tensor | None, width: int) -> "SegmentLayout":
        """Build from lengths.

        Args:
            prompts: Tokens of each prompt, [P].
            completions: Tokens of each completion, [P, G], 0 where a prompt has fewer than G; None without completions.
            width: Tokens of the longest prompt.
        """
        begins = _begins(prompts)
        of_prompts = Segments(begins, begins, width, width, causal=True)
        if completions is None:
            return cls(int(prompts.sum()), 0, width, 0, of_prompts, None, None)
        together = completions.sum(dim=1)
        tokens, most, length, prompt_tokens = torch.stack(
            [together.sum(), together.max(), completions.max(), prompts.sum()]
        ).tolist()
        mine = _begins(completions.flatten())
        shared = Segments(_begins(together), begins, most, width, causal=False)
        return cls(prompt_tokens, tokens, width, length, of_prompts, shared, Segments(mine, mine, length, length, causal=True))


def _begins(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()


def _members(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """For all members of groups of these sizes: the index of each member's group, and its place within the group."""
    group = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
    return group, torch.arange(len(group), device=sizes.device) - (sizes.cumsum(0) - sizes)[group]


def gathered_keys(prompts: Tensor, completions: Tensor, layout: SegmentLayout) -> GatheredKeys:
    """Gather keys for prompts of lengths [P] and completions of lengths [P, G]. The prompt's keys come first."""
    lengths = completions.flatten()
    there = lengths > 0
    widths = torch.where(there, prompts.repeat_interleave(completions.shape[1]), 0)
    ends = (widths + lengths).cumsum(0)
    begins = ends - widths - lengths  # of each completion's keys
    prompt_begins = (prompts.cumsum(0) - prompts).repeat_interleave(completions.shape[1])
    (of_prompt, step), (of_own, own_step), (prompt, place) = (_members(sizes) for sizes in (widths, lengths, prompts))
    own = begins[of_own] + widths[of_own] + own_step
    index = torch.empty(len(of_prompt) + len(of_own), dtype=torch.long, device=prompts.device)
    index[begins[of_prompt] + step] = prompt_begins[of_prompt] + step
    index[own] = layout.prompt_tokens + torch.arange(len(of_own), device=prompts.device)
    repeated = begins.view(completions.shape)[prompt] + place[:, None]
    seen = there.view(completions.shape)[prompt]
    keys = torch.cat([ends.new_zeros(1), ends]).int()
    assert layout.own is not None
    segments = Segments(layout.own.queries, keys, layout.length, layout.width + layout.length, causal=True)
    return GatheredKeys(segments, index, own, torch.where(seen, repeated, 0), seen)


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SegmentLayout,
    gathered: GatheredKeys | None,
    settings: AttentionSettings,
) -> Tensor:
    """Attention of packed tokens, with a backward pass.

    `gathered` holds the keys of completions if the window hides some of a prompt's keys; None if it hides none. Filling tokens
    may follow prompts and completions; their results are zeros.
    """
    if dtype := autocast_dtype(query.device):  # rotary embeddings may have made queries and keys float32
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return _SegmentAttention.apply(query, key, value, layout, gathered, settings)


def _runs(layout: SegmentLayout, gathered: GatheredKeys | None) -> list[tuple[slice, list[tuple[slice | Tensor, Segments]]]]:
    """The queries of the prompts and of the completions, and the runs of keys that they see."""
    prompts = slice(0, layout.prompt_tokens)
    completions = slice(layout.prompt_tokens, layout.prompt_tokens + layout.completion_tokens)
    found: list[tuple[slice, list[tuple[slice | Tensor, Segments]]]] = [(prompts, [(prompts, layout.prompts)])]
    if gathered is not None:
        found.append((completions, [(gathered.index, gathered.segments)]))
    elif layout.completion_tokens:
        assert layout.shared is not None and layout.own is not None
        found.append((completions, [(prompts, layout.shared), (completions, layout.own)]))
    return found


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        layout, gathered, settings = ctx.rest = rest
        found = [
            reduce(joined, (attend(query[mine], key[keys], value[keys], segments, settings) for keys, segments in runs))
            for mine, runs in _runs(layout, gathered)
        ]
        result = _filled([part.result for part in found], len(query))
        ctx.save_for_backward(query, key, value, result, *(part.sums for part in found))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, result, *sums = ctx.saved_tensors
        layout, gathered, settings = ctx.rest
        gradient = gradient.to(result.dtype).contiguous()
        of_query: list[Tensor] = []
        of_key: dict[int, Tensor] = {}  # first packed token of the prompts or completions -> gradients
        of_value: dict[int, Tensor] = {}
        for (mine, runs), total in zip(_runs(layout, gathered), sums, strict=True):
            whole, shares = Attended(result[mine], total), []
            for keys, segments in runs:
                parts = attend_backward(gradient[mine], whole, query[mine], key[keys], value[keys], segments, settings)
                shares.append(parts[0])
                for totals, part in zip((of_key, of_value), parts[1:], strict=True):
                    for first, share in _of_tokens(part, keys, layout, gathered).items():
                        totals[first] = totals[first] + share if first in totals else share
            of_query.append(sum(shares[1:], start=shares[0]))
        found = (_filled(parts, len(query)) for parts in (of_query, list(of_key.values()), list(of_value.values())))
        return *found, None, None, None


def _of_tokens(gradient: Tensor, keys: slice | Tensor, layout: SegmentLayout, gathered: GatheredKeys | None) -> dict[int, Tensor]:
    """Split the gradients of one run of keys into prompts and completions: first packed token -> gradients."""
    if isinstance(keys, slice):
        return {keys.start: gradient}
    assert gathered is not None
    of_prompts = ordered_sums(gradient, gathered.repeated, gathered.there)
    return {0: of_prompts, layout.prompt_tokens: gradient.index_select(0, gathered.own)}


def _filled(parts: list[Tensor], tokens: int) -> Tensor:
    """Concatenate parts [n, ...], and pad with zeros to the number of all tokens."""
    missing = tokens - sum(map(len, parts))
    return torch.cat([*parts, parts[0].new_zeros(missing, *parts[0].shape[1:])] if missing else parts)
