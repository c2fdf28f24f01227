"""Pure functions that build policy losses: ratios, clipping, KL, and means with explicit denominators.

Axes: B sequences, T completion tokens (right-padded). Throughout:

- `logprobs`, `old_logprobs`, `ref_logprobs`, [B, T]: log pi(token) under the policy being trained, the policy before the
  rollout's first step (or that sampled, see `RLLoop.add_logprobs`), and the reference policy.
- `mask`, [B, T] bool: True on sampled tokens. Values outside it (padding, and text that an environment added within a completion)
  may be inf, nan or garbage, and contribute neither values nor gradients: `torch.where` replaces them before the arithmetic,
  since a product of 0 and inf is nan.
- `values`: per token, [B, T], or per sequence, [B].
- A mean is the share of these sequences in it, a scalar: the shares of all micro-batches and ranks add up to the mean. Its
  denominators (`num_sequences`, `num_tokens`, `max_tokens`, ...) count all of them; None counts only the ones in this call.
- An episode whose history was rewritten has several rows. In a mean over sequences it counts once: `row_weights`, [B], are the
  rows' shares of its tokens, so that the mean over sequences of the mean over tokens is over all tokens of the episode. None
  weighs each row with 1. Whatever else belongs to a sequence (a ratio, the length of a mean) belongs to the row.
"""

import torch
from torch import Tensor

MAX_LOG_RATIO = 40.0
"""Larger log-ratios are clamped to this, without gradient: exp(89) overflows float32, and inf * 0 in the backward pass is nan.
The square of exp(40) still fits float32, as gradient norms require. TRL has no such bound; below it the results are equal."""


def log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Log of the importance ratio of each token, l - l_old, [B, T]; 0 outside the mask."""
    return torch.where(mask, logprobs, 0.0) - torch.where(mask, old_logprobs, 0.0)


def token_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Importance ratio of each token, r = exp(l - l_old) (PPO, GRPO), [B, T]; 1 outside the mask."""
    return log_ratio(logprobs, old_logprobs, mask).clamp(max=MAX_LOG_RATIO).exp()


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Length-normalised importance ratio of each sequence, s = exp(sum m (l - l_old) / |o|) (GSPO, equation 7), [B].

    It is 1 for a sequence without tokens.
    """
    means = sequence_means(log_ratio(logprobs, old_logprobs, mask), mask)
    return means.clamp(max=MAX_LOG_RATIO).exp()


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Tensor:
    """Clipped policy objective as a loss, -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), in the shape of `ratio`.

    Args:
        ratio: Importance ratio r, [B, T] or [B].
        advantages: Advantage A of each sequence, [B]; or of each token, [B, T], with a ratio of each token.
        clip_low: The ratio is clipped at 1 - clip_low from below.
        clip_high: The ratio is clipped at 1 + clip_high from above.
        dual_clip: Largest value of the unclipped ratio, which bounds the loss where A < 0 (arXiv 1912.09729; TRL's `delta`);
            None for no bound.
    """
    advantages = per_sequence_as(ratio, advantages)
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    if dual_clip is not None:
        ratio = ratio.clamp(max=dual_clip)
    return -torch.min(ratio * advantages, clipped * advantages)


def clip_flags(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """Where the clip of `clipped_surrogate` stops the gradient: below (A < 0) and above (A > 0), bool in the shape of `ratio`."""
    advantages = per_sequence_as(ratio, advantages)
    return (ratio < 1.0 - clip_low) & (advantages < 0), (ratio > 1.0 + clip_high) & (advantages > 0)


def off_policy_mistakes(
    logprobs: Tensor, sampling_logprobs: Tensor, advantages: Tensor, mask: Tensor, threshold: float
) -> Tensor:
    """Which sequences with A < 0 became less likely by more than `threshold` nats per token since they were sampled, [B] bool.

    With advantages of tokens, [B, T]: which tokens with A < 0 are in such a sequence, [B, T].
    """
    divergence = sequence_means(log_ratio(sampling_logprobs, logprobs.detach(), mask), mask)
    return (advantages < 0) & per_sequence_as(advantages, divergence > threshold)


def k3_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Estimate KL(policy || reference) of each token, k3 = exp(d) - d - 1 with d = l_ref - l, [B, T]; 0 outside the mask.

    Never negative, and unbiased where the tokens come from the policy itself (Schulman,
    http://joschu.net/blog/kl-approx.html; GRPO, equation 4).
    """
    difference = log_ratio(ref_logprobs, logprobs, mask).clamp(max=MAX_LOG_RATIO)
    return torch.expm1(difference) - difference  # exp(d) - 1 would round a small d away


def sequence_means(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of each sequence, [B]; 0, with a zero gradient, for a sequence without tokens."""
    return torch.where(mask, values, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def mean_over_sequences(values: Tensor, num_sequences: float | None = None, row_weights: Tensor | None = None) -> Tensor:
    """Mean over sequences, empty ones included, of one value per row, [B]."""
    weighted = values if row_weights is None else values * row_weights
    return weighted.sum() / _sequences(num_sequences, values, row_weights)


def mean_of_sequence_means(
    values: Tensor, mask: Tensor, num_sequences: float | None = None, row_weights: Tensor | None = None
) -> Tensor:
    """Mean over sequences of the mean over tokens (GRPO)."""
    return mean_over_sequences(sequence_means(values, mask), num_sequences, row_weights)


def mean_over_tokens(values: Tensor, mask: Tensor, num_tokens: float | None = None) -> Tensor:
    """Mean over all tokens (DAPO)."""
    total = torch.where(mask, values, 0.0).sum()
    return total / (mask.sum().clamp(min=1) if num_tokens is None else _denominator(num_tokens, 1))


def mean_over_positions(
    values: Tensor, mask: Tensor, max_tokens: float, num_sequences: float | None = None, row_weights: Tensor | None = None
) -> Tensor:
    """Mean over all positions that a completion could fill (Dr. GRPO).

    `max_tokens` positions of a sequence may be more than T; positions without a token count as 0. `row_weights` only count the
    sequences here.
    """
    sums = torch.where(mask, values, 0.0).sum(dim=1)
    return sums.sum() / _sequences(num_sequences, values, row_weights) / _denominator(max_tokens, 1)


def per_token(values: Tensor, mask: Tensor) -> Tensor:
    """Give every token the value of its sequence: [B] becomes [B, T]; [B, T] stays unchanged."""
    return values.unsqueeze(1).expand(mask.shape) if values.dim() == 1 else values


def per_sequence_as(like: Tensor, values: Tensor) -> Tensor:
    """Reshape values per sequence, [B], to broadcast against `like`, which is [B, T] or [B]; [B, T] stays unchanged."""
    return values.unsqueeze(1) if like.dim() == 2 and values.dim() == 1 else values


def any_advantage(advantages: Tensor) -> Tensor:
    """Which sequences have an advantage that is not 0, [B] bool, from advantages per sequence, [B], or per token, [B, T]."""
    return advantages != 0 if advantages.dim() == 1 else (advantages != 0).any(dim=1)


def _sequences(count: float | None, values: Tensor, row_weights: Tensor | None) -> float:
    """`_denominator` for sequences; the weights of an episode's rows add up to 1."""
    if count is None and row_weights is not None:
        count = float(row_weights.sum())
    return _denominator(count, len(values))


def _denominator(count: float | None, here: int) -> float:
    """The given count, or the count here if it is None; never 0, so that a mean over nothing is 0 and not nan."""
    count = float(here) if count is None else count
    return count if count > 0 else 1.0
