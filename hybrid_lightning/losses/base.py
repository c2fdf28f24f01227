"""`PolicyLoss`: what every policy loss shares, so that a new one is a class of about ten lines.

    loss = aggregate(importance_weights * policy_term + kl_coef * kl)

A subclass gives `policy_term`, and may give `aggregate` (default: mean over sequences of the mean over tokens) and
`policy_metrics`. The base checks the inputs, up-casts half precision, empties the padding, adds the KL term, and logs.

Shares. What a call returns is the *share* of its sequences in the optimizer step's loss: the denominators are those of the
whole step (`LossInputs.num_sequences`, `num_tokens`), so that the shares of all micro-batches and ranks add up to the loss,
and how a step is split never changes its gradient. Metrics are shares likewise: sums over micro-batches and ranks are
the step's values, except names ending in "/max" or "/min", of which the largest or smallest counts. `combine_metrics` does that.

The KL estimate is k3 (see `functional.k3_kl`), GRPO's (arXiv 2402.03300, equation 4): inside the aggregation, outside the
clip. With `kl_importance_weight` it is multiplied by the differentiable ratio, which corrects k3 for tokens that the old
policy sampled (DeepSeek-V3.2, arXiv 2512.02556; TRL's `use_bias_correction_kl`).

Importance weights, if there are any, correct for a sampler that is not quite the policy (see `correction`). They multiply the
policy term of each token after its clip, without gradient; the KL and the metrics stay as they are (as in TRL).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import functional as F
from hybrid_lightning.parts import Part
from hybrid_lightning.types import LossInputs, LossOutput


class PolicyLoss(Part, ABC):
    """Base class of policy losses.

    Args:
        kl_coef: weight of the KL to the start policy; 0 leaves the term out, and no reference is computed.
        kl_importance_weight: multiply the KL by the importance ratio, gradient included.

    Raises:
        ConfigError: if `kl_coef` is negative or not finite.

    Example:
        >>> class ReinforceLoss(PolicyLoss):
        ...     def policy_term(self, inputs, old_logprobs):
        ...         ratio = F.token_ratio(inputs.logprobs, old_logprobs, inputs.completion_mask)
        ...         return -ratio * inputs.advantages[:, None], ratio
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> logprobs = torch.full((2, 2), -1.0, requires_grad=True)
        >>> output = ReinforceLoss()(LossInputs(logprobs, torch.tensor([1.0, -1.0]), mask))
        >>> output.loss.backward()
        >>> logprobs.grad.tolist()
        [[-0.25, -0.25], [0.5, 0.0]]
    """

    def __init__(self, kl_coef: float = 0.0, kl_importance_weight: bool = False) -> None:
        name = type(self).__name__
        if not (math.isfinite(kl_coef) and kl_coef >= 0):
            raise ConfigError(f"{name}: kl_coef={kl_coef} is not a weight: use 0 for no KL term, or e.g. 0.001.")
        self.kl_coef = kl_coef
        self.kl_importance_weight = kl_importance_weight

    @property
    def needs_reference(self) -> bool:
        """Whether `LossInputs.ref_logprobs` must be given."""
        return self.kl_coef != 0

    @property
    def ignores_zero_advantage(self) -> bool:
        """Whether a sequence of advantage 0 adds exactly nothing to the loss and its gradient, so that it can be left out.

        A loss whose policy term is a multiple of the advantage, and which adds nothing else, may say so.
        """
        return False

    @abstractmethod
    def policy_term(self, inputs: LossInputs, old_logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """The loss before KL and aggregation, and the importance ratio.

        Args:
            inputs: float32 or float64 throughout; log-probabilities are 0 on padding.
            old_logprobs: [B, T], those of the inputs, or if there are none the current ones without gradient.

        Returns:
            The loss, [B, T] or [B] where a sequence has one, and the ratio, likewise. Padding may hold anything.
        """

    def aggregate(self, per_token_loss: Tensor, inputs: LossInputs) -> Tensor:
        """Reduce the loss of each token, [B, T], to these sequences' share in the optimizer step's loss."""
        return F.mean_of_sequence_means(per_token_loss, inputs.completion_mask, inputs.num_sequences)

    def policy_metrics(self, inputs: LossInputs, ratio: Tensor) -> dict[str, Tensor]:
        """What to log besides the ratio and the KL: name -> scalar share (see the head of this file)."""
        return {}

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """Compute the loss of one micro-batch.

        Args:
            inputs: log-probabilities (float32, float64, or half precision, which is computed in float32), advantages,
                mask and denominators.

        Returns:
            The share in the optimizer step's loss, differentiable in `inputs.logprobs`, and metrics, which are shares too:
            "ratio/mean" (over sequences where the loss has one ratio a sequence, else over tokens), "ratio/max", with a KL
            term "kl" (mean over tokens, with its importance weight if it has one), and those of `policy_metrics`.

        Raises:
            ConfigError: if shapes or dtypes do not fit together, or the KL term lacks its reference.
        """
        _check(inputs, type(self).__name__, self.needs_reference)
        inputs = _clean(inputs)
        old_logprobs = inputs.logprobs.detach() if inputs.old_logprobs is None else inputs.old_logprobs
        term, ratio = self.policy_term(inputs, old_logprobs)
        self._check_shape("policy_term", "loss", term, inputs.logprobs.shape, inputs.advantages.shape)
        self._check_shape("policy_term", "ratio", ratio, inputs.logprobs.shape, inputs.advantages.shape)
        per_token_loss = F.per_token(term, inputs.completion_mask)
        if inputs.importance_weights is not None:
            per_token_loss = per_token_loss * inputs.importance_weights
        metrics = self._ratio_metrics(inputs, ratio.detach()) | self.policy_metrics(inputs, ratio.detach())
        if self.needs_reference:
            kl = self._kl(inputs, ratio)
            per_token_loss = per_token_loss + self.kl_coef * kl
            metrics["kl"] = F.mean_over_tokens(kl, inputs.completion_mask, inputs.num_tokens)
        loss = self.aggregate(per_token_loss, inputs)
        self._check_shape("aggregate", "loss", loss, torch.Size())
        return LossOutput(loss, {name: value.detach() for name, value in metrics.items()})

    def _check_shape(self, method: str, what: str, value: Tensor, *allowed: torch.Size) -> None:
        """Name the method of a subclass that returned a wrong shape, before broadcasting hides it."""
        if value.shape not in allowed:
            shapes = " or, with one value a sequence, ".join(str(tuple(shape)) for shape in allowed)
            raise ConfigError(f"{type(self).__name__}.{method} returned a {what} of shape {tuple(value.shape)}: return {shapes}.")

    def _kl(self, inputs: LossInputs, ratio: Tensor) -> Tensor:
        """KL to the start policy, [B, T]."""
        assert inputs.ref_logprobs is not None, "checked before"
        kl = F.k3_kl(inputs.logprobs, inputs.ref_logprobs, inputs.completion_mask)
        return kl * F.per_token(ratio, inputs.completion_mask) if self.kl_importance_weight else kl

    def _ratio_metrics(self, inputs: LossInputs, ratio: Tensor) -> dict[str, Tensor]:
        """Mean and largest ratio."""
        return {"ratio/mean": share(ratio, inputs), "ratio/max": largest(ratio, inputs)}


def share(values: Tensor, inputs: LossInputs) -> Tensor:
    """Share of these values in the optimizer step's mean, over tokens if they are [B, T], over sequences if they are [B].

    The mean is over the sequences that take part in the update, where some do not.
    """
    if values.dim() == 2:
        tokens = inputs.num_tokens if inputs.updated_tokens is None else inputs.updated_tokens
        return F.mean_over_tokens(values, inputs.completion_mask, tokens)
    return F.mean_over_sequences(values, inputs.num_sequences if inputs.updated_sequences is None else inputs.updated_sequences)


def largest(values: Tensor, inputs: LossInputs) -> Tensor:
    """Largest of these values, none of them negative, [B, T] or [B]; of no token at all 0, which never wins over another's."""
    return _used_or(0.0, values, inputs).max()


def smallest(values: Tensor, inputs: LossInputs) -> Tensor:
    """Smallest of these ratios or weights, [B, T] or [B]; of no token at all 1, where nothing differs."""
    lowest = _used_or(math.inf, values, inputs).min()
    return torch.where(lowest.isinf(), 1.0, lowest)


def _used_or(other: float, values: Tensor, inputs: LossInputs) -> Tensor:
    """Flat values, with `other` for padding or sequences without tokens, and once more at the end, so that one is there."""
    used = inputs.completion_mask if values.dim() == 2 else inputs.completion_mask.any(dim=1)
    return torch.cat([torch.where(used, values, other).flatten(), values.new_full((1,), other)])


def is_extreme(name: str) -> bool:
    """Whether of a metric of this name the largest or smallest counts, and not the sum."""
    return name.endswith(("/max", "/min"))


def join(name: str, one: Tensor, other: Tensor) -> Tensor:
    """Join two micro-batches' values of the metric `name`."""
    if is_extreme(name):
        return torch.maximum(one, other) if name.endswith("/max") else torch.minimum(one, other)
    return one + other


def combine_metrics(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join the metrics of an optimizer step's micro-batches: extremes of names ending in "/max" or "/min", sums of all others.

    Args:
        parts: the `LossOutput.metrics` of each micro-batch, computed with the step's denominators.

    Returns:
        The metrics of all of them together, again a share if the step has more micro-batches.

    Example:
        >>> parts = [{"kl": torch.tensor(0.5), "ratio/max": torch.tensor(2.0)}, {"kl": torch.tensor(0.25)}]
        >>> {name: value.item() for name, value in combine_metrics(parts).items()}
        {'kl': 0.75, 'ratio/max': 2.0}
    """
    joined: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            joined[name] = join(name, joined[name], value) if name in joined else value
    return joined


def _clean(inputs: LossInputs) -> LossInputs:
    """Compute in float32 at least, without gradient except through `logprobs`, and with 0 for everything padded."""
    dtype = torch.promote_types(inputs.logprobs.dtype, torch.float32)

    def unpad(values: Tensor) -> Tensor:
        return torch.where(inputs.completion_mask, values.to(dtype), 0.0)

    old, ref, weights = inputs.old_logprobs, inputs.ref_logprobs, inputs.importance_weights
    return replace(
        inputs,
        logprobs=unpad(inputs.logprobs),
        advantages=inputs.advantages.detach().to(dtype),
        old_logprobs=None if old is None else unpad(old.detach()),
        ref_logprobs=None if ref is None else unpad(ref.detach()),
        importance_weights=None if weights is None else unpad(weights.detach()),
    )


def _check(inputs: LossInputs, name: str, needs_reference: bool) -> None:
    """Refuse tensors that would broadcast into something else than meant."""
    shape = tuple(inputs.logprobs.shape)
    if len(shape) != 2:
        raise ConfigError(f"{name}: logprobs has shape {shape}: give one log-probability a completion token, [B, T].")
    per_token = ("logprobs", "old_logprobs", "ref_logprobs", "importance_weights")
    floating = {"advantages": shape[:1], **dict.fromkeys(per_token, shape)}
    for field, want in {**floating, "completion_mask": shape}.items():
        value = getattr(inputs, field)
        if value is not None and tuple(value.shape) != want:
            raise ConfigError(f"{name}: {field} has shape {tuple(value.shape)}, but logprobs {shape}: it must be {want}.")
    if inputs.completion_mask.dtype != torch.bool:
        raise ConfigError(f"{name}: completion_mask is {inputs.completion_mask.dtype}: convert it with `.bool()`.")
    for field in floating:
        value = getattr(inputs, field)
        if value is not None and not value.is_floating_point():
            raise ConfigError(f"{name}: {field} is {value.dtype}: convert it with `.float()`.")
    for field in ("num_sequences", "num_tokens", "updated_sequences", "updated_tokens"):
        value = getattr(inputs, field)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{name}: {field}={value} is no count: give that of the optimizer step, or None.")
    if needs_reference and inputs.ref_logprobs is None:
        raise ConfigError(
            f"{name}: kl_coef is not 0, but ref_logprobs is None: give the start policy's log-probabilities, or set kl_coef=0."
        )
