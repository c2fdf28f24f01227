"""Attention of packed prompts and completions by segments, on accelerators: each prompt's keys and values once.

The tokens of a completion see two runs of keys, the prompt's, which all completions of the prompt share, and their own. Each kind
of run is one call (see `segments.py`), and so are the prompts by themselves: three calls for a layer, whatever the lengths. In a
layer whose window hides some of a prompt's keys each completion's keys are gathered behind those of its prompt instead.

Axes are those of `attention.py`, with N packed tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybrid_lightning.engine.segments import Segments, attend, attend_backward, joined


@dataclass(frozen=True)
class GatheredKeys:
    """The keys of each completion's prompt and its own behind them, which a window can be laid over."""

    segments: Segments
    index: Tensor  # [M]: the packed token whose key is in each place
    own: Tensor  # [completion tokens]: the place of each completion token's key
    repeated: Tensor  # [prompt tokens, G]: the places of each prompt token's key
    there: Tensor  # [prompt tokens, G] bool: a prompt may have fewer completions than others


@dataclass(frozen=True)
class SegmentLayout:
    """The segments of prompts and completions that are packed as `packing.py` says."""

    prompt_tokens: int
    completion_tokens: int
    width: int  # tokens of the longest prompt
    length: int  # of the longest completion
    prompts: Segments
    shared: Segments | None  # completions and the keys of their prompts; None where there are none
    own: Segments | None  # completions and their own keys

    @classmethod
    def of(cls, prompts: Tensor, completions: Tensor | None, width: int) -> "SegmentLayout":
        """Make it from lengths.

        Args:
            prompts: Tokens of each prompt, [P].
            completions: Tokens of each completion, [P, G], 0 where a prompt has fewer than G; None for none.
            width: The longest prompt.
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


def gathered_keys(prompts: Tensor, completions: Tensor, layout: SegmentLayout) -> GatheredKeys:
    """For lengths [P] of prompts and [P, G] of completions."""
    device = prompts.device
    lengths = completions.flatten()
    there = lengths > 0
    widths = torch.where(there, prompts.repeat_interleave(completions.shape[1]), 0)
    ends = (widths + lengths).cumsum(0)
    begins = ends - widths - lengths  # of each completion's keys
    row = torch.arange(len(lengths), device=device)
    # The prompt's keys come first.
    of_prompt = torch.repeat_interleave(row, widths)
    step = torch.arange(len(of_prompt), device=device) - (widths.cumsum(0) - widths)[of_prompt]
    prompt_begins = (prompts.cumsum(0) - prompts).repeat_interleave(completions.shape[1])
    of_own = torch.repeat_interleave(row, lengths)
    own_step = torch.arange(len(of_own), device=device) - (lengths.cumsum(0) - lengths)[of_own]
    own = begins[of_own] + widths[of_own] + own_step
    index = torch.empty(len(of_prompt) + len(of_own), dtype=torch.long, device=device)
    index[begins[of_prompt] + step] = prompt_begins[of_prompt] + step
    index[own] = layout.prompt_tokens + torch.arange(len(of_own), device=device)
    prompt = torch.repeat_interleave(torch.arange(len(prompts), device=device), prompts)
    place = torch.arange(len(prompt), device=device) - (prompts.cumsum(0) - prompts)[prompt]
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
    window: int | None,
    scale: float,
) -> Tensor:
    """Attention of packed tokens, with a backward pass.

    Args:
        query: [N, H, D]; behind prompts and completions there may be tokens that nobody reads.
        key: [N, K, D].
        value: [N, K, D].
        layout: The segments.
        gathered: Where the window hides keys of some prompt, the keys that completions see; None otherwise.
        window: A token sees this many positions; None for all.
        scale: Factor of the scores.

    Returns:
        [N, H, D], zeros for the tokens that nobody reads.
    """
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings may have made float32 of queries and keys
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    result: Tensor = _SegmentAttention.apply(query, key, value, layout, gathered, window, scale)  # type: ignore[no-untyped-call]
    return result


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: SegmentLayout,
        gathered: GatheredKeys | None,
        window: int | None,
        scale: float,
    ) -> Tensor:
        begin, end = layout.prompt_tokens, layout.prompt_tokens + layout.completion_tokens
        of_prompts, sums = attend(query[:begin], key[:begin], value[:begin], layout.prompts, window, scale)
        results, kept = [of_prompts], [sums]
        if end > begin:
            mine = query[begin:end]
            if gathered is not None:
                result, sums = attend(mine, key[gathered.index], value[gathered.index], gathered.segments, window, scale)
            else:
                assert layout.shared is not None and layout.own is not None
                result, sums = joined(
                    attend(mine, key[:begin], value[:begin], layout.shared, None, scale),
                    attend(mine, key[begin:end], value[begin:end], layout.own, None, scale),
                )
            results.append(result)
            kept.append(sums)
        if end < len(query):
            results.append(of_prompts.new_zeros(len(query) - end, *of_prompts.shape[1:]))
        result = torch.cat(results)
        ctx.save_for_backward(query, key, value, result, *kept)
        ctx.rest = (layout, gathered, window, scale)
        return result

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, result, *sums = ctx.saved_tensors
        layout, gathered, window, scale = ctx.rest
        begin, end = layout.prompt_tokens, layout.prompt_tokens + layout.completion_tokens
        gradient = gradient.to(result.dtype).contiguous()

        def parts(first: int, last: int) -> tuple[Tensor, ...]:
            return gradient[first:last], query[first:last], result[first:last]

        def of_run(run: slice, keys: slice, of_sums: Tensor, segments: Segments, seen: int | None) -> tuple[Tensor, ...]:
            grad, queries, whole = parts(run.start, run.stop)
            return attend_backward(grad, queries, key[keys], value[keys], whole, of_sums, segments, seen, scale)

        prompts, completions = slice(0, begin), slice(begin, end)
        of_query, of_key, of_value = ([part] for part in of_run(prompts, prompts, sums[0], layout.prompts, window))
        if end > begin and gathered is not None:
            grad, queries, whole = parts(begin, end)
            seen = (key[gathered.index], value[gathered.index])
            mine, *of_seen = attend_backward(grad, queries, *seen, whole, sums[1], gathered.segments, window, scale)
            of_query.append(mine)
            for total, part in zip((of_key, of_value), of_seen, strict=True):
                total[0] = total[0] + _added_up(part, gathered)
                total.append(part.index_select(0, gathered.own))
        elif end > begin:
            shared = of_run(completions, prompts, sums[1], layout.shared, None)
            own = of_run(completions, completions, sums[1], layout.own, None)
            of_query.append(shared[0] + own[0])
            for total, first, second in ((of_key, shared[1], own[1]), (of_value, shared[2], own[2])):
                total[0] = total[0] + first
                total.append(second)
        filled = [
            torch.cat([*found, found[0].new_zeros(len(query) - end, *found[0].shape[1:])])
            if end < len(query)
            else torch.cat(found)
            for found in (of_query, of_key, of_value)
        ]
        return *filled, None, None, None, None


def _added_up(gradient: Tensor, gathered: GatheredKeys) -> Tensor:
    """Gradients of the prompts' keys from those of all places where they were seen, in float32 and in the order of the places."""
    parts = gradient.index_select(0, gathered.repeated.flatten()).unflatten(0, gathered.repeated.shape)
    parts = parts.masked_fill_(~gathered.there[:, :, None, None], 0)
    return parts.sum(dim=1, dtype=torch.promote_types(gradient.dtype, torch.float32)).to(gradient.dtype)
