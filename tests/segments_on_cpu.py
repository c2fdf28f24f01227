"""Lets torch's operator of attention by segments run on a CPU, in plain products of all queries with all keys.

This is not for speed: it shows that the requests to accelerators are right. A kernel computes no more queries of a segment than
it is told there are, so it is an error to tell it of fewer.
"""

import torch


def scores(query, key, queries, keys, causal, window, scale, used=None):
    """[N, H, D], [M, K, D] -> [H, N, M] floats, minus infinity where a query does not see a key; and the keys that are seen."""
    rows, columns = torch.arange(len(query), dtype=queries.dtype)[:, None], torch.arange(len(key))
    segment = torch.searchsorted(queries, rows, right=True).sub(1).clamp(max=len(queries) - 2)
    first = keys[segment]
    last = keys[segment + 1] if used is None else first + used[segment]
    seen = (rows < queries[-1]) & (columns >= first) & (columns < last)
    if causal:
        newest = last - queries[segment + 1] + rows  # the last key that each query sees
        seen = seen & (columns <= newest) & ((columns >= newest - window) | (window < 0))
    found = torch.einsum("nhd,mhd->hnm", floats(query), repeated(key, query.shape[1])) * scale
    return found.masked_fill(~seen, float("-inf")), seen.any(dim=0)


def floats(part):
    return part.to(torch.promote_types(part.dtype, torch.float32))


def repeated(part, heads):
    return floats(part).repeat_interleave(heads // part.shape[1], dim=1)


def check_longest(queries, keys, most_queries, most_keys, used=None):
    longest = int(queries.diff().max()), int((keys.diff() if used is None else used).max())
    assert longest[0] <= most_queries and longest[1] <= most_keys, f"{longest} are longer than {(most_queries, most_keys)}"


def attend(query, key, value, queries, keys, most_queries, most_keys, dropout, causal, mask, *, scale=None, **options):
    assert dropout == 0 and not mask and options["window_size_right"] == (0 if causal else -1)
    check_longest(queries, keys, most_queries, most_keys, options.get("seqused_k"))
    found, seen = scores(query, key, queries, keys, causal, options["window_size_left"], scale, options.get("seqused_k"))
    values = repeated(value, query.shape[1]).masked_fill(~seen[:, None, None], 0)  # where nothing was written yet
    result = torch.einsum("hnm,mhd->nhd", found.softmax(dim=-1).nan_to_num(0), values).to(query.dtype)
    sums = found.logsumexp(dim=-1)  # plus infinity where a query saw no key, as of FlashAttention 2
    return result, sums.masked_fill(sums == -torch.inf, torch.inf), torch.empty(0), torch.empty(0), torch.empty(0)


def backward(gradient, query, key, value, result, sums, queries, keys, most_queries, most_keys, dropout, causal, *_, **options):
    check_longest(queries, keys, most_queries, most_keys)
    scale, heads, slope = options["scale"], query.shape[1], floats(gradient)
    found, _ = scores(query, key, queries, keys, causal, options["window_size_left"], scale)
    weights = (found - sums[:, :, None]).exp().nan_to_num(0)
    of_weights = torch.einsum("nhd,mhd->hnm", slope, repeated(value, heads))
    of_scores = weights * (of_weights - (slope * floats(result)).sum(-1).t()[:, :, None]) * scale
    of_query = torch.einsum("hnm,mhd->nhd", of_scores, repeated(key, heads))
    of_key = torch.einsum("hnm,nhd->mhd", of_scores, floats(query)).unflatten(1, (key.shape[1], -1)).sum(2)
    of_value = torch.einsum("hnm,nhd->mhd", weights, slope).unflatten(1, (key.shape[1], -1)).sum(2)
    return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype)


_OPERATORS = torch.library.Library("aten", "IMPL")
_OPERATORS.impl("_flash_attention_forward", attend, "CPU")
_OPERATORS.impl("_flash_attention_backward", backward, "CPU")
