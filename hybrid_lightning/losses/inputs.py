"""What a policy loss is given: refused where it cannot be meant, and made ready to compute with."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.types import LossInputs

COUNTS = (
    "num_sequences",
    "num_tokens",
    "updated_sequences",
    "updated_tokens",
    "max_completion_tokens",
    "micro_batch_tokens",
    "num_micro_batches",
)


def clean_inputs(inputs: LossInputs) -> LossInputs:
    """Compute in float32 at least, without gradient except through `logprobs` and `entropy`, with 0 for everything padded."""
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
        entropy=None if inputs.entropy is None else unpad(inputs.entropy),
    )


def check_inputs(inputs: LossInputs, name: str, needs_reference: bool, needs_entropy: bool) -> None:
    """Refuse tensors that would broadcast into something else than meant."""
    shape = tuple(inputs.logprobs.shape)
    if len(shape) != 2:
        raise ConfigError(f"{name}: logprobs has shape {shape}: give one log-probability a completion token, [B, T].")
    per_token = ("logprobs", "old_logprobs", "ref_logprobs", "importance_weights", "entropy")
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
    for field in COUNTS:
        value = getattr(inputs, field)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{name}: {field}={value} is no count: give that of the optimizer step, or None.")
    if needs_reference and inputs.ref_logprobs is None:
        raise ConfigError(
            f"{name}: kl_coef is not 0, but ref_logprobs is None: give the start policy's log-probabilities, or set kl_coef=0."
        )
    if needs_entropy and (inputs.entropy is None or (inputs.logprobs.requires_grad and not inputs.entropy.requires_grad)):
        what = "is None" if inputs.entropy is None else "has no gradient"
        raise ConfigError(
            f"{name}: entropy_coef is not 0, but entropy {what}: give the entropy of each token with gradient, or "
            "set entropy_coef=0."
        )
