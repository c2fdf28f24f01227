"""Attention in which the completions of a prompt share the prompt's keys and values.

Axes: P prompts, G completions of each, S prompt tokens, T query tokens of a completion, M keys of a completion, H query heads, K
key-value heads (grouped-query attention: H = K * R), D numbers a head.

Two ways to compute it, which give the same numbers:

- by matrix products over all queries of a prompt at once, whose scores are recomputed in the backward pass. On CPUs this is many
  times faster than the fused kernel at the lengths of rollouts (measured at S=128, T=64: 50 ms instead of 170 to 250 for forward
  and backward), and keys and values are never repeated;
- by `scaled_dot_product_attention` with repeated keys and values on accelerators, whose kernels keep no scores.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

KeysValues = tuple[Tensor, Tensor]
# Of the prompt's keys and of the completion's own; None where every query sees every key.
Masks = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class AttentionSettings:
    """What a model's layer asks for besides queries, keys and values."""

    scaling: float | None = None  # factor of the scores; None: 1 / sqrt(D)
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    dropout: float = 0.0


def shared_attention(
    query: Tensor, prompt: KeysValues | None, own: KeysValues, masks: Masks, settings: AttentionSettings
) -> Tensor:
    """Attend to the keys of the prompt and those of the completion itself.

    Args:
        query: [P, K, G, R, T, D].
        prompt: Keys and values, [P, K, S, D] each, that all G completions see; None for none (S = 0).
        own: Keys and values, [P, K, G, M, D] each.
        masks: Bool, broadcastable to [P, 1, G, 1, T, S] and [P, 1, G, 1, T, M]: True where a query may look. Every query must see
            a key.
        settings: Of the layer.

    Returns:
        [P, K, G, R, T, D] in the dtype of the values.
    """
    compute = _by_products if query.device.type == "cpu" or settings.softcap is not None else _by_kernel
    width = own[0].shape[3] + (prompt[0].shape[2] if prompt is not None else 0)
    if not torch.is_grad_enabled() or width <= query.shape[-1]:
        return compute(query, prompt, own, masks, settings)
    # Neither scores nor repeated keys are kept for the backward pass: where a query sees more keys than it has numbers, both are
    # larger than all else that a layer keeps.
    result: Tensor = checkpoint(compute, query, prompt, own, masks, settings, use_reentrant=False)  # type: ignore[no-untyped-call]
    return result


def cached_key_dtype(key: Tensor) -> torch.dtype:
    """The dtype to keep keys in that many later calls will use: the one that they would else be converted to every time."""
    return torch.float32 if key.device.type == "cpu" else key.dtype


def _by_products(query: Tensor, prompt: KeysValues | None, own: KeysValues, masks: Masks, settings: AttentionSettings) -> Tensor:
    prompts, heads, samples, repeats, length, size = query.shape
    keys, values = own
    scaling = settings.scaling if settings.scaling is not None else size**-0.5
    each = (prompts * heads * samples, repeats * length)  # one product for the queries of a completion with its own keys
    all_of_prompt = (prompts * heads, samples * repeats * length)  # one for those of all completions with the prompt's
    shape = (prompts, heads, samples, repeats, length)
    with torch.autocast(query.device.type, enabled=False):
        # Scores in float32, as the fused kernels have them: in bfloat16 a score of 10 is off by up to 0.03.
        scaled = query.float() * scaling
        scores = [torch.bmm(scaled.reshape(*each, size), keys.float().flatten(0, 2).transpose(1, 2)).view(*shape, -1)]
        if prompt is not None:
            prompt_keys = prompt[0].float().flatten(0, 1).transpose(1, 2)
            scores.insert(0, torch.bmm(scaled.reshape(*all_of_prompt, size), prompt_keys).view(*shape, -1))
        if settings.softcap is not None:
            scores = [settings.softcap * torch.tanh(part / settings.softcap) for part in scores]
        used = masks if prompt is not None else masks[1:]
        scores = [
            part if mask is None else part.masked_fill_(~mask, float("-inf")) for part, mask in zip(scores, used, strict=True)
        ]
        joined = torch.cat(scores, dim=-1) if prompt is not None else scores[0]
        weights = joined.softmax(dim=-1)
        weights = F.dropout(weights, settings.dropout, training=settings.dropout > 0).to(values.dtype)
        own_weights = weights[..., -keys.shape[3] :]
        result = torch.bmm(own_weights.reshape(*each, -1), values.flatten(0, 2)).view_as(query)
        if prompt is not None:
            prompt_weights = weights[..., : -keys.shape[3]].reshape(*all_of_prompt, -1)
            result = result + torch.bmm(prompt_weights, prompt[1].flatten(0, 1)).view_as(query)
        return result


def _by_kernel(query: Tensor, prompt: KeysValues | None, own: KeysValues, masks: Masks, settings: AttentionSettings) -> Tensor:
    prompts, heads, samples, repeats, length, size = query.shape

    def rows(part: Tensor) -> Tensor:  # [P, K, G, M, D] -> [P G, K R, M, D]
        repeated = part.transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, repeats, -1, -1)
        return repeated.reshape(prompts * samples, heads * repeats, part.shape[3], part.shape[4])

    keys, values = own
    if prompt is not None:
        shared = [part[:, :, None].expand(-1, -1, samples, -1, -1) for part in prompt]
        keys, values = torch.cat([shared[0], keys], dim=3), torch.cat([shared[1], values], dim=3)
    mask = None
    if masks[1] is not None or (prompt is not None and masks[0] is not None):
        widths = [keys.shape[3] - own[0].shape[3], own[0].shape[3]]
        full = [
            torch.ones((), dtype=torch.bool, device=query.device) if part is None else part
            for part in (masks[0] if prompt is not None else None, masks[1])
        ]
        shape = (prompts, 1, samples, 1, length)
        mask = torch.cat([part.expand(*shape, width) for part, width in zip(full, widths, strict=True)], dim=-1)
        mask = mask.reshape(prompts * samples, 1, length, keys.shape[3])
    result = F.scaled_dot_product_attention(
        query.transpose(1, 2).reshape(prompts * samples, heads * repeats, length, size),
        rows(keys),
        rows(values),
        attn_mask=mask,
        dropout_p=settings.dropout,
        scale=settings.scaling,
    )
    return result.view(prompts, samples, heads, repeats, length, -1).transpose(1, 2)
