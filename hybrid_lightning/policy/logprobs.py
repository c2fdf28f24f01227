"""Log-probabilities of completion tokens under a policy.

The policy is the distribution that rollouts were sampled from: softmax(logits / temperature). Truncation by top-p or top-k is
not part of it (as in TRL and verl), so that the gradient is defined for every token.
"""

import inspect

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hybrid_lightning.types import Sequences


def position_ids(mask: Tensor) -> Tensor:
    """Positions [B, L] that count real tokens only, so that left padding does not move a prompt. Padding gets 0."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the forward of the (possibly PEFT-wrapped) model takes a keyword argument by name."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return argument in inspect.signature(base.forward).parameters


def token_logprobs(model: nn.Module, sequences: Sequences, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every completion token.

    Args:
        model: Causal language model with the Hugging Face forward.
        sequences: B prompts (left-padded) and completions (right-padded, T tokens).
        temperature: Divides the logits; must be that of the sampling.

    Returns:
        Log-probabilities [B, T] float32 with gradient, and entropies [B, T] float32 in nats without. Values at padding are
        finite and meaningless: mask them.
    """
    completion_ids = sequences.completion_ids
    length = completion_ids.shape[1]
    mask = torch.cat([sequences.prompt_mask, sequences.completion_mask], dim=1)
    arguments: dict[str, Tensor | int | bool] = {
        "input_ids": torch.cat([sequences.prompt_ids, completion_ids], dim=1),
        "attention_mask": mask.long(),
        "use_cache": False,
    }
    if accepts(model, "position_ids"):
        arguments["position_ids"] = position_ids(mask)
    if accepts(model, "logits_to_keep"):  # the prompt's logits are never needed: for a long prompt the largest tensor
        arguments["logits_to_keep"] = length + 1
    logits = model(**arguments).logits[:, -(length + 1) : -1]
    rows = [
        # Recomputed in backward, so that the float32 copy of one row's logits lives at a time and not those of the batch.
        checkpoint(_row_logprobs, logits[row], completion_ids[row], temperature, use_reentrant=False)
        for row in range(len(sequences))
    ]
    return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


def _row_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One sequence: logits [T, V], ids [T] -> log-probabilities [T] and entropies [T]."""
    scaled = logits.float() / temperature
    logprobs = scaled.log_softmax(dim=-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    return logprobs.gather(1, ids[:, None]).squeeze(1), entropy
