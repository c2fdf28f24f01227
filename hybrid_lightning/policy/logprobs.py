"""Log-probabilities of completion tokens under a policy.

The policy is the distribution that rollouts were sampled from: softmax(logits / temperature). Truncation by top-p or top-k is
not part of it (as in TRL and verl), so that the gradient is defined for every token.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hybrid_lightning.rollout.forward import last_logits, new_cache, position_ids, recomputes_activations
from hybrid_lightning.types import Sequences

# Logits are turned into float32 log-probabilities in blocks of at most this many numbers (64 MiB).
_BLOCK = 2**24
# A prompt is shared if that leaves at most this share of the tokens: below it, one forward pass is faster than two.
_WORTH_SHARING = 0.8


def token_logprobs(model: nn.Module, sequences: Sequences, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every completion token.

    The forward and backward pass of a prompt is shared by neighbouring rows that have the same prompt, where that saves work.

    Args:
        model: Causal language model with the Hugging Face forward.
        sequences: B prompts (left-padded) and completions (right-padded, T tokens).
        temperature: Divides the logits; must be that of the sampling.

    Returns:
        Log-probabilities [B, T] float32 with gradient, and entropies [B, T] float32 in nats without. Values at padding are
        finite and meaningless: mask them.
    """
    groups = _prompt_groups(sequences)
    if _can_share(model, sequences, groups):
        logits = _shared_prompt_logits(model, sequences, groups)
    else:
        logits = _separate_logits(model, sequences)
    ids = sequences.completion_ids
    rows = max(1, _BLOCK // (logits.shape[1] * logits.shape[2]))
    if rows >= len(ids):
        return _block_logprobs(logits, ids, temperature)
    blocks = [
        # Recomputed in the backward pass, so that one block's float32 copy lives at a time and not that of the batch.
        checkpoint(_block_logprobs, logits[start : start + rows], ids[start : start + rows], temperature, use_reentrant=False)
        for start in range(0, len(ids), rows)
    ]
    return torch.cat([block[0] for block in blocks]), torch.cat([block[1] for block in blocks])


def _separate_logits(model: nn.Module, sequences: Sequences) -> Tensor:
    """Logits [B, T, V] before each completion token, every row with its own prompt."""
    length = sequences.completion_ids.shape[1]
    mask = torch.cat([sequences.prompt_mask, sequences.completion_mask], dim=1)
    ids = torch.cat([sequences.prompt_ids, sequences.completion_ids], dim=1)
    return last_logits(model, ids, mask, position_ids(mask), length + 1)[:, :-1]


def _prompt_groups(sequences: Sequences) -> Tensor:
    """Number of the prompt of each row [B], counting runs of neighbours with the same prompt."""
    prompts = torch.cat([sequences.prompt_ids, sequences.prompt_mask.long()], dim=1)
    changes = (prompts[1:] != prompts[:-1]).any(dim=1).long()
    return torch.cat([changes.new_zeros(1), changes.cumsum(dim=0)])


def _can_share(model: nn.Module, sequences: Sequences, groups: Tensor) -> bool:
    if recomputes_activations(model):  # which cannot recompute a layer that has written to the cache
        return False
    (rows, prompt_length), length = sequences.prompt_ids.shape, sequences.completion_ids.shape[1]
    shared = (int(groups[-1]) + 1) * prompt_length + rows * length
    return shared <= _WORTH_SHARING * rows * (prompt_length + length)


def _shared_prompt_logits(model: nn.Module, sequences: Sequences, groups: Tensor) -> Tensor:
    """The same as `_separate_logits`: prompts go through the model once, and their keys and values serve all their rows."""
    cache = new_cache(model)
    first = torch.cat([groups.new_ones(1), groups.diff()]).bool()
    prompt_ids, prompt_mask = sequences.prompt_ids[first], sequences.prompt_mask[first]
    logits = last_logits(model, prompt_ids, prompt_mask, position_ids(prompt_mask), 1, cache)[groups]
    if sequences.completion_ids.shape[1] == 1:
        return logits
    cache.batch_select_indices(groups)
    ids, width = sequences.completion_ids[:, :-1], sequences.prompt_ids.shape[1]
    mask = torch.cat([sequences.prompt_mask, sequences.completion_mask[:, :-1]], dim=1)
    rest = last_logits(model, ids, mask, position_ids(mask)[:, width:], ids.shape[1], cache)
    return torch.cat([logits, rest], dim=1)


def _block_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Logits [b, T, V], ids [b, T] -> log-probabilities [b, T] and entropies [b, T]."""
    logprobs = (logits.float() / temperature).log_softmax(dim=-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    return logprobs.gather(2, ids[..., None]).squeeze(2), entropy
