"""Which tokens of an optimizer step get a policy gradient."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hybrid_lightning.losses import TopEntropyMask
from hybrid_lightning.sharding.ranks import gather_objects
from hybrid_lightning.types import PolicyBatch


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
