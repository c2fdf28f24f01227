"""Lets torch's operator of attention by segments run on a CPU, segment by segment in plain products.

Nobody wants that for its speed: it shows that what accelerators are asked for is right.
"""

import torch


def runs(queries, keys, used=None):
    queries, keys = queries.tolist(), keys.tolist()
    counts = [None] * (len(queries) - 1) if used is None else used.tolist()
    for place, count in enumerate(counts):
        first, last = keys[place : place + 2]
        run, seen = slice(*queries[place : place + 2]), slice(first, last if count is None else first + count)
        if run.start < run.stop and seen.start < seen.stop:
            yield run, seen


def repeated(part, heads):
    return part.float().repeat_interleave(heads // part.shape[1], dim=1)


def scores(query, key, causal, window, scale):
    """[n, H, D], [m, K, D] -> [H, n, m] float32."""
    found = torch.einsum("nhd,mhd->hnm", query.float(), repeated(key, query.shape[1])) * scale
    if not causal:
        return found
    last = torch.arange(len(query))[:, None] + len(key) - len(query)  # the last key that each query sees
    keys = torch.arange(len(key))
    seen = keys <= last
    if window >= 0:
        seen = seen & (keys >= last - window)
    return found.masked_fill_(~seen, float("-inf"))


def attend(query, key, value, queries, keys, most_queries, most_keys, dropout, causal, mask, *, scale=None, **options):
    window, used = options["window_size_left"], options.get("seqused_k")
    assert dropout == 0 and not mask and options["window_size_right"] == (0 if causal else -1)
    result, sums = torch.zeros_like(query), torch.full((query.shape[1], len(query)), float("-inf"))
    for run, seen in runs(queries, keys, used):
        found = scores(query[run], key[seen], causal, window, scale)
        sums[:, run] = found.logsumexp(dim=-1)
        values = repeated(value[seen], query.shape[1])
        result[run] = torch.einsum("hnm,mhd->nhd", found.softmax(dim=-1), values).to(result.dtype)
    return result, sums, torch.empty(0), torch.empty(0), torch.empty(0)


def backward(gradient, query, key, value, result, sums, queries, keys, most_queries, most_keys, dropout, causal, *_, **options):
    window, scale = options["window_size_left"], options["scale"]
    of_query, of_key, of_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    heads = query.shape[1]
    for run, seen in runs(queries, keys):
        slope = gradient[run].float()
        weights = (scores(query[run], key[seen], causal, window, scale) - sums[:, run, None]).exp()
        of_weights = torch.einsum("nhd,mhd->hnm", slope, repeated(value[seen], heads))
        of_weights = of_weights - (slope * result[run].float()).sum(-1).t()[:, :, None]
        of_scores = weights * of_weights * scale
        of_query[run] = torch.einsum("hnm,mhd->nhd", of_scores, repeated(key[seen], heads)).to(query.dtype)
        for total, part in (
            (of_key, torch.einsum("hnm,nhd->mhd", of_scores, query[run].float())),
            (of_value, torch.einsum("hnm,nhd->mhd", weights, slope)),
        ):
            total[seen] = part.unflatten(1, (total.shape[1], -1)).sum(2).to(total.dtype)
    return of_query, of_key, of_value


_OPERATORS = torch.library.Library("aten", "IMPL")
_OPERATORS.impl("_flash_attention_forward", attend, "CPU")
_OPERATORS.impl("_flash_attention_backward", backward, "CPU")
