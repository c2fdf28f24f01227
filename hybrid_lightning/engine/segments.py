"""Attention of segments by FlashAttention's kernels (`torch.nn.attention.varlen`), one run of keys at a time.

A *segment* is a run of neighbouring queries and the run of neighbouring keys that they may see; one call computes segments of
unequal lengths, without padding and without masks. A call gives the log-sum-exps of its scores, by which two calls with the same
queries are put together. With l_1 and l_2 of the two, the whole is

    o = exp(l_1 - l) o_1 + exp(l_2 - l) o_2,   l = log(exp l_1 + exp l_2)

The gradient of a score s is p (do . v - do . o) with p = exp(s - l). So a call's backward pass, given o and l of the whole
in place of its own, gives its share of the gradients of the whole; ring attention (Liu and others, arXiv 2310.01889) rests on
the same.

On a CPU the same calls are computed segment by segment in plain products. Nobody wants that for its speed: it shows that what
accelerators are asked for is right. Axes are those of `attention.py`, with N queries and M keys in all segments together.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from hybrid_lightning.engine.compiling import one_kernel

_HALF = (torch.float16, torch.bfloat16)
_LARGEST_HEAD = 256  # D that FlashAttention's kernels have, a multiple of 8
_OLDEST = (8, 0)  # compute capability: Ampere


@dataclass(frozen=True)
class Segments:
    """Runs of queries, and the run of keys that each sees, one behind the other."""

    queries: Tensor  # [n + 1] int32: where each begins, and the end
    keys: Tensor  # [n + 1] int32, likewise
    most_queries: int  # in one segment
    most_keys: int
    causal: bool  # whether the last query of a segment sees all of its keys, the one before it all but the last, and so on


def joined(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Put together what the same queries found among two runs of keys.

    Args:
        first: Results [N, H, D] and log-sum-exps [H, N] float32 of one run; these may be minus infinity, where it has no keys.
        second: Of the other.

    Returns:
        Those of both runs together.
    """
    result: tuple[Tensor, Tensor] = _joined(*first, *second)
    return result


def _plain_joined(one: Tensor, one_sum: Tensor, other: Tensor, other_sum: Tensor) -> tuple[Tensor, Tensor]:
    sums = torch.logaddexp(one_sum, other_sum)
    weights = [(part - sums).exp().t()[:, :, None] for part in (one_sum, other_sum)]
    return torch.addcmul(one * weights[0], other, weights[1]).to(one.dtype), sums


def _lean_joined(one: Tensor, one_sum: Tensor, other: Tensor, other_sum: Tensor) -> tuple[Tensor, Tensor]:
    sums = torch.logaddexp(one_sum, other_sum)
    weights = [(part - sums).exp().t()[:, :, None] for part in (one_sum, other_sum)]
    return torch.addcmul(one * weights[0], other, weights[1], out=torch.empty_like(one)), sums


_joined = one_kernel(_plain_joined, otherwise=_lean_joined)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    window: int | None,
    scale: float,
    used: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each segment's queries to its keys, without a gradient.

    Args:
        query: [N, H, D].
        key: [M, K, D].
        value: [M, K, D].
        segments: Where they begin.
        window: Of causal segments: a query sees so many keys; None for all.
        scale: Factor of the scores.
        used: Keys of each segment that are looked at, the first ones, [n] int32; None for all.

    Returns:
        Results [N, H, D], and the log-sum-exps of the scores [H, N] float32.
    """
    if query.device.type == "cpu" and not isinstance(query, FakeTensor):
        return _attend_by_products(query, key, value, segments, window, scale, used)
    grouped = query.shape[1] != key.shape[1]
    result, sums, _ = torch.ops.torch_attn._varlen_attn(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        segments.queries,
        segments.keys,
        segments.most_queries,
        segments.most_keys,
        segments.causal,
        scale,
        _window(segments, window),
        grouped,
        used,
    )
    return result, sums


def attend_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    result: Tensor,
    sums: Tensor,
    segments: Segments,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values of one run of keys.

    Args:
        gradient: Of the result over all runs, [N, H, D].
        query: [N, H, D].
        key: [M, K, D].
        value: [M, K, D].
        result: Over all runs of keys, [N, H, D].
        sums: Log-sum-exps over all runs, [H, N] float32.
        segments: Where queries and keys begin.
        window: See `attend`.
        scale: See `attend`.
    """
    if query.device.type == "cpu" and not isinstance(query, FakeTensor):
        return _backward_by_products(gradient, query, key, value, result, sums, segments, window, scale)
    # Without this the kernel adds up the gradients of queries by atomics, in an order that no seed decides.
    with _in_one_order():
        of_query, of_key, of_value = torch.ops.torch_attn._varlen_attn_backward(
            gradient,
            query.contiguous(),
            key.contiguous(),
            value.contiguous(),
            result.contiguous(),
            sums,
            segments.queries,
            segments.keys,
            segments.most_queries,
            segments.most_keys,
            segments.causal,
            torch.zeros(2, dtype=torch.uint64, device=query.device),  # random state of dropout, of which there is none
            scale,
            _window(segments, window),
        )
    return of_query, of_key, of_value


def _window(segments: Segments, window: int | None) -> list[int]:
    if not segments.causal:
        return [-1, -1]
    return [-1 if window is None or window >= segments.most_keys else window - 1, 0]


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


def why_no_segments(device: torch.device, dtype: torch.dtype) -> str:
    """Why attention by segments cannot be had on a device in a dtype, in words for the user; empty where it can."""
    if device.type != "cuda":
        return f"{device.type} has no kernels of it"
    return why_no_kernels(dtype) or _why_not_on(device.index)


def why_no_kernels(dtype: torch.dtype) -> str:
    """The same, for an accelerator that could have it."""
    if dtype not in _HALF:
        return f"its kernels have 16 bits, and the model computes with {str(dtype).partition('.')[2]}"
    return "" if has_varlen() else "torch 2.13 or later has it"


@cache
def _why_not_on(index: int | None) -> str:
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without FlashAttention"
    capability = torch.cuda.get_device_capability(index)
    return "" if capability >= _OLDEST else f"it needs compute capability 8.0, and this GPU has {'.'.join(map(str, capability))}"


@cache
def has_varlen() -> bool:
    """Whether torch has `varlen_attn` with grouped queries and the number of used keys."""
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return False
    operator = getattr(getattr(torch.ops, "torch_attn", None), "_varlen_attn", None)
    arguments = {argument.name for argument in operator.default._schema.arguments} if operator is not None else set()
    return hasattr(varlen, "varlen_attn") and {"enable_gqa", "seqused_k"} <= arguments


def has_head_size(*tensors: Tensor) -> bool:
    """Whether the kernels have the size of these heads, the last axis."""
    size = tensors[0].shape[-1]
    return size <= _LARGEST_HEAD and size % 8 == 0 and all(part.shape[-1] == size for part in tensors)


def _runs(segments: Segments, used: Tensor | None = None) -> Iterator[tuple[slice, slice]]:
    queries, keys = segments.queries.tolist(), segments.keys.tolist()
    counts = [None] * (len(queries) - 1) if used is None else used.tolist()
    for place, count in enumerate(counts):
        first, last = keys[place : place + 2]
        yield slice(*queries[place : place + 2]), slice(first, last if count is None else first + count)


def _scores(query: Tensor, key: Tensor, causal: bool, window: int | None, scale: float) -> Tensor:
    """[n, H, D], [m, K, D] -> [H, n, m] float32."""
    repeated = key.float().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = torch.einsum("nhd,mhd->hnm", query.float(), repeated) * scale
    if not causal:
        return scores
    last = torch.arange(len(query))[:, None] + len(key) - len(query)  # the last key that each query sees
    keys = torch.arange(len(key))
    seen = keys <= last
    if window is not None:
        seen = seen & (keys > last - window)
    return scores.masked_fill_(~seen, float("-inf"))


def _attend_by_products(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, window: int | None, scale: float, used: Tensor | None
) -> tuple[Tensor, Tensor]:
    result = query.new_zeros(*query.shape[:2], value.shape[2])
    sums = torch.full((query.shape[1], len(query)), float("-inf"))
    for run, keys in _runs(segments, used):
        if run.start == run.stop or keys.start == keys.stop:
            continue
        scores = _scores(query[run], key[keys], segments.causal, window, scale)
        sums[:, run] = scores.logsumexp(dim=-1)
        values = value[keys].float().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        result[run] = torch.einsum("hnm,mhd->nhd", scores.softmax(dim=-1), values).to(result.dtype)
    return result, sums


def _backward_by_products(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    result: Tensor,
    sums: Tensor,
    segments: Segments,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    of_query, of_key, of_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    repeats = query.shape[1] // key.shape[1]
    for run, keys in _runs(segments):
        if run.start == run.stop or keys.start == keys.stop:
            continue
        slope = gradient[run].float()
        weights = (_scores(query[run], key[keys], segments.causal, window, scale) - sums[:, run, None]).exp()
        values = value[keys].float().repeat_interleave(repeats, dim=1)
        of_weights = torch.einsum("nhd,mhd->hnm", slope, values) - (slope * result[run].float()).sum(-1).t()[:, :, None]
        of_scores = weights * of_weights * scale
        repeated = key[keys].float().repeat_interleave(repeats, dim=1)
        of_query[run] = torch.einsum("hnm,mhd->nhd", of_scores, repeated).to(query.dtype)
        for total, part in (
            (of_key, torch.einsum("hnm,nhd->mhd", of_scores, query[run].float())),
            (of_value, torch.einsum("hnm,nhd->mhd", weights, slope)),
        ):
            total[keys] = part.unflatten(1, (-1, repeats)).sum(2).to(total.dtype)
    return of_query, of_key, of_value
