"""Attention by segments: FlashAttention's kernels for sequences of unequal lengths, one run of keys at a time.

A *segment* is a run of neighbouring queries and the run of neighbouring keys that they may see. One call computes segments of
unequal lengths, without padding or masks. It also returns the log-sum-exps of its scores, which combine two calls with the same
queries. With log-sum-exps l_1 and l_2 the combined result is

    o = exp(l_1 - l) o_1 + exp(l_2 - l) o_2,   l = log(exp l_1 + exp l_2)

The gradient of a score s is p (do . v - do . o) with p = exp(s - l). So a call's backward pass, given the combined o and l
instead of its own, returns its share of the combined gradients. Ring attention (Liu and others, arXiv 2310.01889) uses the same
identity.

Axes are as in `attention.py`, with N queries and M keys in all segments together.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybrid_lightning.runner.attention import AttentionSettings
from hybrid_lightning.runner.compiling import OneKernel


@dataclass(frozen=True)
class Segments:
    """Runs of queries, one after the other, and the run of keys that each sees."""

    queries: Tensor  # [n + 1] int32: where each begins, and the end
    keys: Tensor  # [n + 1] int32, likewise
    most_queries: int  # in one segment
    most_keys: int
    causal: bool  # whether the last query of a segment sees all of its keys, the one before it all but the last, and so on


class Attended(NamedTuple):
    """Attention of queries to a part of their keys."""

    result: Tensor  # [N, H, D]
    sums: Tensor  # [H, N] float32: log-sum-exps of the scores; plus or minus infinity where a query saw no key


def joined(first: Attended, second: Attended) -> Attended:
    """Combine the attention of the same queries to two runs of keys."""
    return Attended(*joined_results(*first, *second))


@partial(OneKernel, "rows h _, h rows, rows h _, h rows")
def joined_results(one: Tensor, one_sum: Tensor, other: Tensor, other_sum: Tensor) -> tuple[Tensor, Tensor]:
    """`joined` for tensors: two results [N, H, D] and their log-sum-exps [H, N]."""
    # FlashAttention gives plus infinity where a query saw no key.
    sums = [torch.where(part < torch.inf, part, -torch.inf) for part in (one_sum, other_sum)]
    share = torch.sigmoid(sums[0] - sums[1]).t()[:, :, None]  # of the first: exp(l_1 - l)
    return torch.lerp(other.float(), one.float(), share).to(one.dtype), torch.logaddexp(*sums)


def grouped(query: Tensor, heads: int) -> Tensor:
    """[N, H, D] -> [N R, K, D] for K key-value heads: R query heads that share one become R queries, which read its keys once."""
    return query.unflatten(1, (heads, -1)).transpose(1, 2).reshape(-1, heads, query.shape[-1])


def ungrouped(result: Tensor, repeats: int) -> Tensor:
    """[N R, K, D] -> [N, H, D], the inverse of `grouped`, for R repeats."""
    return result.unflatten(0, (-1, repeats)).transpose(1, 2).flatten(1, 2)


def attend(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, settings: AttentionSettings, used: Tensor | None = None
) -> Attended:
    """Attention of each segment's queries [N, H, D] to its keys and values [M, K, D], without a gradient.

    Windows apply in causal segments only. `used` [n] int32 limits each segment to its first keys; None for all.
    """
    return attending(query, segments, settings, used)(query.contiguous(), key.contiguous(), value.contiguous())


def attending(
    query: Tensor, segments: Segments, settings: AttentionSettings, used: Tensor | None = None
) -> Callable[[Tensor, Tensor, Tensor], Attended]:
    """`attend` as a function of contiguous queries, keys and values, for many calls with queries of this shape."""
    arguments = {**_kernel_arguments(query, segments, settings), "return_debug_mask": False, "seqused_k": used}

    def call(query: Tensor, key: Tensor, value: Tensor) -> Attended:
        result, sums = torch.ops.aten._flash_attention_forward(query=query, key=key, value=value, **arguments)[:2]
        return Attended(result, sums)

    return call


def attend_backward(
    gradient: Tensor, whole: Attended, query: Tensor, key: Tensor, value: Tensor, segments: Segments, settings: AttentionSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values for one run of keys, given the gradient of the combined result."""
    # By default the kernel adds up the gradients of queries with atomics, in an order that no seed decides.
    with _in_one_order():
        return torch.ops.aten._flash_attention_backward(
            grad_out=gradient,
            query=query.contiguous(),
            key=key.contiguous(),
            value=value.contiguous(),
            out=whole.result.contiguous(),
            logsumexp=whole.sums,
            rng_state=torch.zeros(2, dtype=torch.uint64, device=query.device),  # for dropout, which is unused
            unused=torch.empty(0, device=query.device),
            **_kernel_arguments(query, segments, settings),
        )


def _kernel_arguments(query: Tensor, segments: Segments, settings: AttentionSettings) -> dict[str, Any]:
    """Keyword arguments that both operators share; the schemas of torch 2.8 to 2.13 have all of them."""
    window = -1
    if segments.causal and settings.window is not None and settings.window < segments.most_keys:
        window = settings.window - 1
    return {
        "cum_seq_q": segments.queries,
        "cum_seq_k": segments.keys,
        "max_q": segments.most_queries,
        "max_k": segments.most_keys,
        "dropout_p": 0.0,
        "is_causal": segments.causal,
        "scale": settings.factor(query),
        "window_size_left": window,
        "window_size_right": 0 if segments.causal else -1,
    }


@contextmanager
def _in_one_order() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
