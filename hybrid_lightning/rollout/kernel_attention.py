"""Attention of training and prefill by matrix products, with kernels for all that lies between them.

Axes as in `attention.py`. Scores of the prompt's keys and of a completion's own are never joined, cut apart, masked or converted
in passes of their own.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybrid_lightning.kernels import calls as kernels
from hybrid_lightning.kernels.calls import Pair

# Of the prompt's keys and of the completion's own; None where every query sees every key.
Masks = tuple[Tensor | None, Tensor | None]


def kernel_attention(
    query: Tensor, prompt: tuple[Tensor, Tensor] | None, own: tuple[Tensor, Tensor], masks: Masks, scaling: float
) -> Tensor:
    """What `shared_attention` computes, where there are kernels for these tensors: see there."""
    shared = (None, None) if prompt is None else prompt
    result: Tensor = _KernelAttention.apply(query, *own, *shared, masks, scaling)  # type: ignore[no-untyped-call]
    return result


class _KernelAttention(torch.autograd.Function):
    """Attention with a gradient; it makes the weights once more where keeping them would cost memory.

    Where a query sees more keys than it has numbers, its weights are larger than all else that a layer keeps.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        prompt_keys: Tensor | None,
        prompt_values: Tensor | None,
        masks: Masks,
        scaling: float,
    ) -> Tensor:
        dtype = values.dtype
        with torch.autocast("cpu", enabled=False):
            weights = _scores(_dense(query, torch.float32), prompt_keys, keys)
            stored = kernels.attention_weights(weights, masks, scaling, dtype)
            kept = weights if keys.shape[3] + _width(prompt_keys) <= query.shape[-1] else (None, None)
            del weights
            result = torch.bmm(each(stored[1]), _own(values, dtype)).view(*query.shape[:-1], -1)
            if stored[0] is not None and prompt_values is not None:
                all_of_prompt(result).baddbmm_(all_of_prompt(stored[0]), _shared(prompt_values, dtype))
        ctx.save_for_backward(query, keys, values, prompt_keys, prompt_values, *kept)
        ctx.masks, ctx.scaling = masks, scaling
        return result

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, values, prompt_keys, prompt_values, *kept = ctx.saved_tensors
        dtype = values.dtype
        with torch.autocast("cpu", enabled=False):
            exact = _dense(query, torch.float32)
            if kept[1] is None:
                weights = _scores(exact, prompt_keys, keys)
                stored = kernels.attention_weights(weights, ctx.masks, ctx.scaling, dtype)
            else:  # slopes take the place of weights
                stored = (None if kept[0] is None else kept[0].to(dtype), kept[1].to(dtype))
                weights = (None if kept[0] is None else kept[0].clone(), kept[1].clone())
            outer = _dense(gradient, dtype)
            of_values = torch.bmm(each(stored[1]).transpose(1, 2), each(outer)).view(values.shape)
            own = torch.bmm(each(outer), _own(values, dtype).transpose(1, 2))
            shared = of_prompt_keys = of_prompt_values = None
            if stored[0] is not None:
                of_prompt_values = torch.bmm(all_of_prompt(stored[0]).transpose(1, 2), all_of_prompt(outer))
                shared = torch.bmm(all_of_prompt(outer), _shared(prompt_values, dtype).transpose(1, 2))
            del stored
            kernels.attention_slopes(weights, (shared, own), ctx.scaling)
            del shared, own
            of_keys = torch.bmm(each(weights[1]).transpose(1, 2), each(exact)).view(keys.shape)
            of_query = torch.bmm(each(weights[1]), _own(keys, torch.float32)).view(query.shape)
            if weights[0] is not None:
                slopes = all_of_prompt(weights[0])
                of_prompt_keys = (
                    torch.bmm(slopes.transpose(1, 2), all_of_prompt(exact)).view(prompt_keys.shape).to(prompt_keys.dtype)
                )
                all_of_prompt(of_query).baddbmm_(slopes, _shared(prompt_keys, torch.float32))
                of_prompt_values = of_prompt_values.view(prompt_values.shape)  # type: ignore[union-attr]
        return of_query.to(query.dtype), of_keys.to(keys.dtype), of_values, of_prompt_keys, of_prompt_values, None, None


def _scores(query: Tensor, prompt_keys: Tensor | None, keys: Tensor) -> Pair:
    """Of [P, K, G, R, T, D], contiguous, before they are scaled.

    float32, as the fused kernels have them: in bfloat16 a score of 10 is off by up to 0.03.
    """
    own = torch.bmm(each(query), _own(keys, torch.float32).transpose(1, 2)).view(*query.shape[:-1], -1)
    if prompt_keys is None:
        return None, own
    shared = _shared(prompt_keys, torch.float32).transpose(1, 2)
    return torch.bmm(all_of_prompt(query), shared).view(*query.shape[:-1], -1), own


def _width(prompt_keys: Tensor | None) -> int:
    return 0 if prompt_keys is None else prompt_keys.shape[2]


def _dense(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous and in a dtype, by one copy at most."""
    if part.dtype == dtype and part.is_contiguous():
        return part
    return part.new_empty(part.shape, dtype=dtype).copy_(part)


def _own(part: Tensor, dtype: torch.dtype) -> Tensor:
    """[P, K, G, M, D] -> [P K G, M, D]."""
    return _dense(part, dtype).flatten(0, 2)


def _shared(part: Tensor, dtype: torch.dtype) -> Tensor:
    """[P, K, S, D] -> [P K, S, D]."""
    return _dense(part, dtype).flatten(0, 1)


def each(part: Tensor) -> Tensor:
    """[P, K, G, R, T, x] -> [P K G, R T, x]: one product for the queries of a completion with its own keys."""
    prompts, heads, samples, repeats, length, _ = part.shape
    return part.reshape(prompts * heads * samples, repeats * length, -1)


def all_of_prompt(part: Tensor) -> Tensor:
    """[P, K, G, R, T, x] -> [P K, G R T, x]: one product for the queries of all completions with the prompt's keys."""
    prompts, heads, samples, repeats, length, _ = part.shape
    return part.reshape(prompts * heads, samples * repeats * length, -1)
