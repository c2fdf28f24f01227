"""Weights of tokens in the policy term: by the disagreement of sampling and training on a token, and by its entropy.

Axes: B sequences, T completion tokens.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hybrid_lightning.losses import ImportanceCorrection, TopEntropyMask
from hybrid_lightning.losses import functional as F
from hybrid_lightning.losses.shares import largest, share, smallest
from hybrid_lightning.sharding.ranks import gather_objects
from hybrid_lightning.types import LossInputs, PolicyBatch


def compare_with_sampler(
    batch: PolicyBatch, logprobs: Tensor, correction: ImportanceCorrection | None, old_of_sampler: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Measure the distance between sampling and training log-probabilities, and weigh tokens by it.

    No extra forward pass is needed: training's log-probabilities are the old ones or, in an exactly on-policy step, the current
    ones (which LoRA's dropout, if used, changes). Both belong to the weights that sampled, unless rollouts begin ahead.

    Args:
        batch: A micro-batch or a chunk of one.
        logprobs: Log-probabilities [B, T] of the policy being trained.
        correction: Weights the policy term; None for no weights.
        old_of_sampler: Whether the old log-probabilities are the sampler's, so that the current ones must be compared.

    Returns:
        |l_train - l_sample| of each token, [B, T]; and the correction's weights, [B, T] or [B], or None.
    """
    mask = batch.sequences.sampled_mask
    trained = logprobs.detach() if batch.old_logprobs is None or old_of_sampler else batch.old_logprobs
    difference = F.log_ratio(trained, batch.sampling_logprobs, mask).abs()
    return difference, None if correction is None else correction(trained, batch.sampling_logprobs, mask)


def sampling_metrics(difference: Tensor, weights: Tensor | None, inputs: LossInputs) -> dict[str, Tensor]:
    """Metrics of the results of `compare_with_sampler`, as shares of the optimizer step's metrics (see `losses.shares`).

    `sampling/logp_difference/mean` and `/max` are over tokens. With a correction, there are also
    `sampling/importance_weight/mean`, `/min` and `/max`, over sequences if it has one weight per sequence, else over tokens.
    """
    metrics = {
        "sampling/logp_difference/mean": share(difference, inputs),
        "sampling/logp_difference/max": largest(difference, inputs),
    }
    if weights is not None:
        metrics |= {
            "sampling/importance_weight/mean": share(weights, inputs),
            "sampling/importance_weight/min": smallest(weights, inputs),
            "sampling/importance_weight/max": largest(weights, inputs),
        }
    return metrics


def mask_tokens(batches: Sequence[PolicyBatch], entropies: Sequence[Tensor], mask: TopEntropyMask) -> list[PolicyBatch]:
    """Set `policy_mask` of an optimizer step's micro-batches by their entropies, [B, T], under the policy that sampled.

    All ranks share one threshold, from the entropies of all sequences that have an advantage (with credit by turn, of all such
    tokens). All ranks must call this.
    """
    masks = [batch.sequences.sampled_mask for batch in batches]
    with_advantage = [
        entropy[tokens & F.per_sequence_as(tokens, batch.advantages != 0)]
        for batch, entropy, tokens in zip(batches, entropies, masks, strict=True)
    ]
    threshold = mask.threshold(torch.cat(gather_objects(torch.cat(with_advantage).cpu())))
    return [
        replace(batch, policy_mask=tokens & (entropy >= threshold))
        for batch, entropy, tokens in zip(batches, entropies, masks, strict=True)
    ]


def versions_of_rows(weights_step: Tensor, mask: Tensor) -> Tensor:
    """Number of weight versions that sampled each sequence, [B] float32; `mask` [B, T] marks the sampled tokens."""
    latest = torch.where(mask, weights_step, -1).cummax(dim=1).values  # versions only grow
    return ((latest[:, 1:] > latest[:, :-1]) & (latest[:, :-1] >= 0)).sum(dim=1).float() + 1
