"""Attention in which the completions of a prompt share the prompt's keys and values.

Axes: P prompts, G completions of each, S prompt tokens, T query tokens of a completion, M keys of a completion, H query heads, K
key-value heads (grouped-query attention: H = K * R), D numbers per head.

Four implementations give the same numbers:

- our own operator over all packed tokens, on CPUs that support it. Nothing is cut out or padded, scores exist for a dozen
  queries at a time, and only queries, keys and values are kept for the backward pass. On two cores (AMD EPYC, Zen 4) forward and
  backward pass took 0.3 to 0.6 of the time of matrix products, with prompts of 6 to 512 and completions of 10 to 128 tokens;
- matrix products over all queries of a prompt at once. At the lengths of rollouts this is many times faster on CPUs than torch's
  fused kernel (S=128, T=64: forward and backward pass took 50 ms instead of 170 to 250), and keys and values are never repeated;
- segments (`segments.py`), on accelerators that have the kernels;
- `scaled_dot_product_attention` with repeated keys and values, on other accelerators. Their kernels keep no scores.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from hybrid_lightning.runner.backend import Backend
from hybrid_lightning.runner.cpu import operators as kernels
from hybrid_lightning.runner.cpu.operators import Groups

KeysValues = tuple[Tensor, Tensor]

_LARGEST_HEAD = 256  # largest D in FlashAttention's kernels; D must be a multiple of 8


@dataclass(frozen=True, eq=False)
class Masks:
    """Which keys each query sees; the same for all layers of a pass."""

    prompt: Tensor | None = None  # bool, broadcastable to [P, 1, G, 1, T, S]; None where every query sees every key
    own: Tensor | None = None  # likewise, to [P, 1, G, 1, T, M]
    _joint: list[Tensor] = field(default_factory=list)  # made once per pass instead of in every layer

    def joint(self, shape: tuple[int, ...], prompt: int, own: int) -> Tensor | None:
        """One mask over S prompt keys (0 to leave them out) followed by M own keys, for a shape (P, G, T).

        Returns:
            [P G, 1, T, S + M] bool; None where every query sees every key.
        """
        parts = [(self.prompt, prompt), (self.own, own)] if prompt else [(self.own, own)]
        if all(part is None for part, _ in parts):
            return None
        if not self._joint:
            prompts, samples, length = shape
            seen = next(part for part, _ in parts if part is not None).new_ones(())
            full = [(seen if part is None else part).expand(prompts, 1, samples, 1, length, width) for part, width in parts]
            self._joint.append(torch.cat(full, dim=-1).reshape(prompts * samples, 1, length, prompt + own))
        return self._joint[0]


@dataclass(frozen=True)
class AttentionSettings:
    """Settings of a layer's attention, besides queries, keys and values."""

    window: int | None = None  # a token sees this many positions, itself included; None for all
    scaling: float | None = None  # factor of the scores; None: 1 / sqrt(D)
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    dropout: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether weights are just the softmax of scaled scores."""
        return self.softcap is None and self.dropout == 0

    def has_operator(self, backend: Backend, *tensors: Tensor) -> bool:
        """Whether the operator can compute the attention; the last axis of each tensor is D."""
        size = tensors[0].shape[-1]
        return self.plain and all(part.shape[-1] == size for part in tensors) and backend.usable(*tensors)

    def fits_segments(self, *tensors: Tensor) -> bool:
        """Whether FlashAttention's kernels can compute the attention by segments; the last axis of each tensor is D."""
        size = tensors[0].shape[-1]
        return self.plain and size <= _LARGEST_HEAD and size % 8 == 0 and all(part.shape[-1] == size for part in tensors)

    def factor(self, query: Tensor) -> float:
        """The factor of the scores, for queries [..., D]."""
        return self.scaling if self.scaling is not None else query.shape[-1] ** -0.5


class UnsupportedAttentionError(Exception):
    """A model's layers need attention that packings cannot compute; the message gives the cause."""


class Packing(Protocol):
    """Decides which tokens attend to which, among N tokens of several sequences packed into one."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """Attention of N tokens in a decoder layer, [N, H, D], for queries [N, H, D], keys and values [N, K, D]."""


@dataclass
class AttentionCalls:
    """What the layers requested in a trial pass, one entry per call of attention."""

    settings: list[AttentionSettings] = field(default_factory=list)
    by_segments: list[bool] = field(default_factory=list)  # whether kernels could compute it by segments


def shared_attention(
    query: Tensor, prompt: KeysValues | None, own: KeysValues, masks: Masks, settings: AttentionSettings, backend: Backend
) -> Tensor:
    """Attend to the keys of the prompt and of the completion itself.

    Args:
        query: [P, K, G, R, T, D].
        prompt: Keys and values, [P, K, S, D] each, seen by all G completions; None if there are none (S = 0).
        own: Keys and values, [P, K, G, M, D] each.
        masks: Which keys queries see. Every query must see a key.
        settings: The layer's settings.
        backend: The model's backend.

    Returns:
        [P, K, G, R, T, D] in the dtype of the values.
    """
    by_products = backend.is_cpu(query.device) or settings.softcap is not None  # no kernel has a softcap
    compute = _by_products if by_products else _by_kernel
    width = own[0].shape[3] + (prompt[0].shape[2] if prompt is not None else 0)
    if not torch.is_grad_enabled() or width <= query.shape[-1]:
        return compute(query, prompt, own, masks, settings)
    # Neither scores nor repeated keys are kept for the backward pass: they would be larger than everything else a layer keeps.
    return checkpoint(compute, query, prompt, own, masks, settings, use_reentrant=False)


def _by_products(query: Tensor, prompt: KeysValues | None, own: KeysValues, masks: Masks, settings: AttentionSettings) -> Tensor:
    """One product of all completions' queries with the prompt's keys, and one of each completion's queries with its own keys.

    Scores are float32, as in the fused kernels: in bfloat16 a score of 10 is off by up to 0.03.
    """
    runs = [(*own, masks.own)] if prompt is None else [(*prompt, masks.prompt), (*own, masks.own)]
    shape, size, scores, results = query.shape[:-1], query.shape[-1], [], []
    with torch.autocast(query.device.type, enabled=False):
        scaled = (query.float() * settings.factor(query)).contiguous()
        for keys, _, mask in runs:
            keys = keys.float().flatten(0, -3)
            part = torch.bmm(scaled.view(len(keys), -1, size), keys.transpose(1, 2)).view(*shape, -1)
            if settings.softcap is not None:
                part = settings.softcap * torch.tanh(part / settings.softcap)
            scores.append(part if mask is None else part.masked_fill_(~mask, float("-inf")))
        weights = (torch.cat(scores, dim=-1) if len(scores) > 1 else scores[0]).softmax(dim=-1)
        weights = F.dropout(weights, settings.dropout, training=settings.dropout > 0).to(own[1].dtype)
        for part, (_, values, _) in zip(weights.split([part.shape[-1] for part in scores], dim=-1), runs, strict=True):
            values = values.flatten(0, -3)
            results.append(torch.bmm(part.reshape(len(values), -1, part.shape[-1]), values).view(*shape, -1))
    return results[0] if len(results) == 1 else results[0] + results[1]


def _by_kernel(query: Tensor, prompt: KeysValues | None, own: KeysValues, masks: Masks, settings: AttentionSettings) -> Tensor:
    prompts, heads, samples, repeats, length, size = query.shape

    def rows(part: Tensor) -> Tensor:  # [P, K, G, M, D] -> [P G, K R, M, D]
        repeated = part.transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, repeats, -1, -1)
        return repeated.reshape(prompts * samples, heads * repeats, part.shape[3], part.shape[4])

    keys, values = own
    if prompt is not None:
        shared = [part[:, :, None].expand(-1, -1, samples, -1, -1) for part in prompt]
        keys, values = torch.cat([shared[0], keys], dim=3), torch.cat([shared[1], values], dim=3)
    mask = masks.joint((prompts, samples, length), keys.shape[3] - own[0].shape[3], own[0].shape[3])
    result = F.scaled_dot_product_attention(
        query.transpose(1, 2).reshape(prompts * samples, heads * repeats, length, size),
        rows(keys),
        rows(values),
        attn_mask=mask,
        dropout_p=settings.dropout,
        scale=settings.scaling,
    )
    return result.view(prompts, samples, heads, repeats, length, -1).transpose(1, 2)


def packed_attention(query: Tensor, key: Tensor, value: Tensor, groups: Groups, window: int | None, scaling: float) -> Tensor:
    """`operators.packed_attention` with a backward pass."""
    return _PackedAttention.apply(query, key, value, groups, window, scaling)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.rest = rest
        return kernels.packed_attention(query, key, value, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *kernels.packed_attention_backward(gradient, *ctx.saved_tensors, *ctx.rest), None, None, None
