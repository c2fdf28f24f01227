"""Attention of packed prompts and completions by segments, on accelerators: each prompt's keys and values once.

The tokens of a completion see two runs of keys, the prompt's, which all completions of the prompt share, and their own. Each kind
of run is one call (see `segments.py`), and so are the prompts by themselves: three calls for a layer, whatever the lengths.

Axes are those of `attention.py`, with N packed tokens.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybrid_lightning.engine.attention import AttentionSettings
from hybrid_lightning.engine.backend import autocast_dtype
from hybrid_lightning.engine.segments import Attended, Segments, attend, attend_backward, joined


@dataclass(frozen=True)
class SegmentLayout:
    """The segments of prompts and completions that are packed as in `packing.py`."""

    prompt_tokens: int
    completion_tokens: int
    width: int  # tokens of the longest prompt
    length: int  # of the longest completion
    prompts: Segments
    shared: Segments | None  # completions and the keys of their prompts; None where there are none
    own: Segments | None  # completions and their own keys

    @classmethod
    def of(cls, prompts: Tensor, completions: Tensor | None, width: int) -> "SegmentLayout":
        """For so many tokens of each prompt, [P], of which the longest has `width`, and of each of its completions, [P, G].

        These have 0 tokens where a prompt has fewer than G; None is for prompts alone.
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


def segment_attention(query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout, settings: AttentionSettings) -> Tensor:
    """Attention of packed tokens, with a backward pass.

    After prompts and completions there may be tokens that nobody reads, whose results are zeros.
    """
    if dtype := autocast_dtype(query.device):  # rotary embeddings may have made float32 of queries and keys
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return _SegmentAttention.apply(query, key, value, layout, settings)


def _runs(layout: SegmentLayout) -> list[tuple[slice, list[tuple[slice, Segments]]]]:
    """The queries of the prompts and of the completions, and the runs of keys that they see."""
    prompts = slice(0, layout.prompt_tokens)
    completions = slice(layout.prompt_tokens, layout.prompt_tokens + layout.completion_tokens)
    found = [(prompts, [(prompts, layout.prompts)])]
    if layout.completion_tokens:
        assert layout.shared is not None and layout.own is not None
        found.append((completions, [(prompts, layout.shared), (completions, layout.own)]))
    return found


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout, settings: AttentionSettings
    ) -> Tensor:
        found = [
            reduce(joined, (attend(query[mine], key[keys], value[keys], segments, settings) for keys, segments in runs))
            for mine, runs in _runs(layout)
        ]
        result = _filled([part.result for part in found], len(query))
        ctx.save_for_backward(query, key, value, result, *(part.sums for part in found))
        ctx.rest = (layout, settings)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, result, *sums = ctx.saved_tensors
        layout, settings = ctx.rest
        gradient = gradient.to(result.dtype).contiguous()
        of_query: list[Tensor] = []
        of_keys: dict[int, tuple[Tensor, Tensor]] = {}  # of keys and values, by the first packed token of prompts and completions
        for (mine, runs), total in zip(_runs(layout), sums, strict=True):
            whole, shares = Attended(result[mine], total), []
            for keys, segments in runs:
                share, *parts = attend_backward(gradient[mine], whole, query[mine], key[keys], value[keys], segments, settings)
                shares.append(share)
                before = of_keys.get(keys.start)
                of_keys[keys.start] = (parts[0], parts[1]) if before is None else (before[0] + parts[0], before[1] + parts[1])
            of_query.append(sum(shares[1:], start=shares[0]))
        of_key, of_value = (list(parts) for parts in zip(*of_keys.values(), strict=True))
        return *(_filled(parts, len(query)) for parts in (of_query, of_key, of_value)), None, None


def _filled(parts: list[Tensor], tokens: int) -> Tensor:
    """Parts [n, ...] one behind the other, and zeros up to the number of all tokens."""
    missing = tokens - sum(map(len, parts))
    return torch.cat([*parts, parts[0].new_zeros(missing, *parts[0].shape[1:])] if missing else parts)
