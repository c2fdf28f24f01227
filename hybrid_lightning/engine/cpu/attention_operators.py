"""The kernels of attention as functions of tensors. Axes are those of `engine/attention.py`; N tokens are one packed sequence."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from hybrid_lightning.engine.cpu.operators import call_kernel

DECODED_HEAD_SIZES = {32, 64, 96, 128, 256}  # values of D that `decode_attention` is compiled for


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    slots: Tensor,
    counts: Tensor,
    lengths: Tensor,
    window: int | None,
    scaling: float,
) -> Tensor:
    """Attention of N new tokens of completions. Their keys and values are written behind the completions' own.

    Args:
        query: [N, H, D].
        key: [N, K, D].
        value: [N, K, D].
        prompt: Keys and values of the prompts, [P, K, S, D] each, padded on the right; contiguous.
        own: Keys and values of the completions, [P, K, G, capacity, D] each; contiguous.
        slots: The slot of each token's completion, [N] int64, counted over [P, G].
        counts: Tokens of its completion up to the new one, which is included, [N] int64.
        lengths: Tokens of each prompt, [P] int64.
        window: A token sees this many positions; None for all.
        scaling: Factor of the scores.

    Returns:
        [N, H, D].
    """
    heads, (count, all_heads, size) = key.shape[1], query.shape
    new = [_dense_tokens(part) for part in (query, key, value)]
    result = query.new_empty(query.shape)
    tensors = (*new, *prompt, *own, slots, counts, lengths, result)
    sizes = (count, own[0].shape[2], heads, all_heads // heads, prompt[0].shape[2], own[0].shape[3], size)
    strides = [part.stride(0) for part in new]
    call_kernel("decode_attention", query.dtype, tensors, *sizes, window or 0, scaling, *strides)
    return result


def _dense_tokens(part: Tensor) -> Tensor:
    """The same [N, heads, D], with the numbers of a token side by side in memory."""
    return part if part.stride(2) == 1 and part.stride(1) == part.shape[2] else part.contiguous()


class Groups(NamedTuple):
    """Where each prompt and each completion lies among N packed tokens: as a segment. A group is a prompt and its completions.

    Tensors are int64 and contiguous.
    """

    segments: Tensor  # [count, 2]: begin and end of each, group by group, the prompt's before those of its completions
    first: Tensor  # [groups + 1]: the number of each group's first segment, and at the end the count


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
    call_kernel("packed_attention", query.dtype, (*parts, result, *groups), *_packed_numbers(parts, groups, window, scaling))
    return result


def packed_attention_backward(
    outer: Tensor, query: Tensor, key: Tensor, value: Tensor, groups: Groups, window: int | None, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from the gradient of `packed_attention`."""
    parts = [_dense_tokens(part) for part in (query, key, value)]
    results = (query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape))
    numbers = _packed_numbers(parts, groups, window, scaling)
    call_kernel("packed_attention_backward", query.dtype, (*parts, outer.contiguous(), *results, *groups), *numbers)
    return results


def _packed_numbers(parts: Sequence[Tensor], groups: Groups, window: int | None, scaling: float) -> tuple[Any, ...]:
    query, key, _ = parts
    heads = (key.shape[1], query.shape[1] // key.shape[1], query.shape[2])
    return len(groups.first) - 1, *heads, window or 0, scaling, *(part.stride(0) for part in parts)
