"""How much each token counts in the policy term: by how far sampling and training disagree on it, and by its entropy."""

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
    batch: PolicyBatch, logprobs: Tensor, correction: ImportanceCorrection | None
) -> tuple[LossInputs, dict[str, Tensor]]:
    """Make the loss's inputs, and measure how far sampling and training log-probabilities are apart.

    Both are of the weights that sampled: the old log-probabilities, or on the exactly on-policy micro-batch the current ones,
    which the dropout of LoRA, if there is any, tells apart from the sampler's. No forward pass is needed.

    Args:
        batch: The micro-batch.
        logprobs: Log-probabilities [B, T] of the policy being trained.
        correction: Weighs the policy term; None leaves it as it is.

    Returns:
        The inputs, and metrics that are shares in the optimizer step (see `losses.shares`): `sampling/logp_difference/mean` and
        `/max`, of |l_train - l_sample| over tokens; with a correction `sampling/importance_weight/mean`, `/min` and `/max`, over
        sequences where it has one weight a sequence, else over tokens.
    """
    mask = batch.sequences.completion_mask
    trained = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    inputs = batch.loss_inputs(logprobs)
    difference = F.log_ratio(trained, batch.sampling_logprobs, mask).abs()
    metrics = {
        "sampling/logp_difference/mean": share(difference, inputs),
        "sampling/logp_difference/max": largest(difference, inputs),
    }
    if correction is None:
        return inputs, metrics
    weights = correction(trained, batch.sampling_logprobs, mask)
    metrics |= {
        "sampling/importance_weight/mean": share(weights, inputs),
        "sampling/importance_weight/min": smallest(weights, inputs),
        "sampling/importance_weight/max": largest(weights, inputs),
    }
    weights = F.per_token(weights, mask)
    if inputs.importance_weights is not None:  # tokens that are left out stay left out
        weights = weights * inputs.importance_weights
    return replace(inputs, importance_weights=weights), metrics


def mask_tokens(batches: Sequence[PolicyBatch], entropies: Sequence[Tensor], mask: TopEntropyMask) -> list[PolicyBatch]:
    """Set `policy_mask`, with one threshold for the micro-batches of all ranks.

    All ranks have to call it.

    Args:
        batches: This rank's micro-batches of one optimizer step.
        entropies: [B, T] of each, under the policy that sampled.
        mask: Finds the threshold, over the tokens of all sequences that have an advantage.
    """
    masks = [batch.sequences.completion_mask for batch in batches]
    taught = [
        entropy[tokens & (batch.advantages != 0)[:, None]]
        for batch, entropy, tokens in zip(batches, entropies, masks, strict=True)
    ]
    threshold = mask.threshold(torch.cat(gather_objects(torch.cat(taught).cpu())))
    return [
        replace(batch, policy_mask=tokens & (entropy >= threshold))
        for batch, entropy, tokens in zip(batches, entropies, masks, strict=True)
    ]
