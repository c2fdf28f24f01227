"""The kernels of attention as functions of tensors. Axes as in `rollout/attention.py`, and N tokens in a row."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from hybrid_lightning.engine.cpu import operators as calls

DECODED_HEAD_SIZES = {32, 64, 96, 128, 256}  # that `decode_attention` was compiled for


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    slots: Tensor,
    lengths: Tensor,
    decoded: int,
    window: int | None,
    scaling: float,
) -> Tensor:
    """Attention of one new token of each of B rows, whose key and value become the last of its own.

    Args:
        query: [B, H, D].
        key: [B, K, D].
        value: [B, K, D].
        prompt: Keys and values [P, K, S, D], padded on the right; contiguous.
        own: Keys and values [P, K, G, capacity, D]; contiguous.
        slots: Of each row, counted over [P, G]; int64.
        lengths: Tokens of each prompt; int64.
        decoded: Tokens of a completion, the new one included.
        window: A token sees this many positions; None for all.
        scaling: Factor of the scores.

    Returns:
        [B, H, D].
    """
    heads, (count, all_heads, size) = key.shape[1], query.shape
    new = [_dense_tokens(part) for part in (query, key, value)]
    result = query.new_empty(query.shape)
    tensors = (*new, *prompt, *own, slots, lengths, result)
    sizes = (count, own[0].shape[2], heads, all_heads // heads, prompt[0].shape[2], own[0].shape[3], size)
    strides = [part.stride(0) for part in new]
    calls.call("decode_attention", query.dtype, tensors, *sizes, decoded, window or 0, scaling, *strides)
    return result


def _dense_tokens(part: Tensor) -> Tensor:
    """[N, heads, D] in which a token's numbers lie together."""
    return part if part.stride(2) == 1 and part.stride(1) == part.shape[2] else part.contiguous()


class Groups(NamedTuple):
    """Prompts and their completions in a row of N tokens, of which each belongs to one segment; int64 and contiguous."""

    segments: Tensor  # [count, 2]: begin and end of each, group by group, its prompt's first
    first: Tensor  # [groups + 1]: number of each group's first segment, and the count


def packed_attention(query: Tensor, key: Tensor, value: Tensor, groups: Groups, window: int | None, scaling: float) -> Tensor:
    """Attention of every token to its prompt's keys and to its own segment's, up to its own.

    Args:
        query: [N, H, D].
        key: [N, K, D].
        value: [N, K, D].
        groups: Who sees whom.
        window: A token sees this many positions, counted over prompt and completion; None for all.
        scaling: Factor of the scores.

    Returns:
        [N, H, D].
    """
    parts = [_dense_tokens(part) for part in (query, key, value)]
    result = query.new_empty(query.shape)
    calls.call("packed_attention", query.dtype, (*parts, result, *groups), *_packed_numbers(parts, groups, window, scaling))
    return result


def packed_attention_backward(
    outer: Tensor, query: Tensor, key: Tensor, value: Tensor, groups: Groups, window: int | None, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from that of `packed_attention`."""
    parts = [_dense_tokens(part) for part in (query, key, value)]
    results = (query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape))
    numbers = _packed_numbers(parts, groups, window, scaling)
    calls.call("packed_attention_backward", query.dtype, (*parts, outer.contiguous(), *results, *groups), *numbers)
    return results


def _packed_numbers(parts: Sequence[Tensor], groups: Groups, window: int | None, scaling: float) -> tuple[Any, ...]:
    query, key, _ = parts
    heads = (key.shape[1], query.shape[1] // key.shape[1], query.shape[2])
    return len(groups.first) - 1, *heads, window or 0, scaling, *(part.stride(0) for part in parts)
