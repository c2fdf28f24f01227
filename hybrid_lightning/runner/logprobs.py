"""Log-probabilities of sampled tokens under a policy.

The policy is the distribution that rollouts were sampled from: softmax(logits / temperature). It does not include truncation by
top-p or top-k (as in TRL and verl), so the gradient is defined for every token.

If the model takes packed sequences, a B x T x V tensor never exists: hidden states become logits block by block.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from hybrid_lightning.runner.backend import HALF, Backend
from hybrid_lightning.runner.cpu import operators as kernels
from hybrid_lightning.runner.passes import (
    base_model,
    plain_projection,
    product_dtype,
    project,
    projection_weight,
    separate_logits,
)
from hybrid_lightning.types import Sequences

if TYPE_CHECKING:
    from hybrid_lightning.runner.model_runner import ModelRunner  # with PEFT, which is slow to import


def token_logprobs(
    runner: "ModelRunner", sequences: Sequences, temperature: float, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every sampled token.

    Neighbouring rows with the same prompt share its forward and backward pass. Tokens that were not sampled get no logits. If the
    model can be packed, no padding is computed.

    Args:
        runner: ModelRunner of a causal language model.
        sequences: B prompts (left-padded) and completions (right-padded, T tokens).
        temperature: Divides the logits; must equal the sampling temperature.
        entropy_gradient: Whether entropies have a gradient, which keeps one more hidden-size vector per token.

    Returns:
        Log-probabilities [B, T] float32 with gradient, and entropies [B, T] float32 in nats; both 0 where nothing was sampled.
    """
    mask = sequences.sampled_mask
    tokens = sequences.completion_ids[mask]
    model = runner.model
    runner.prepare()
    hidden = runner.predicting(sequences)
    if hidden is not None:
        logprobs, entropy = logprobs_of_hidden(runner, hidden, tokens, temperature, entropy_gradient)
    else:
        logprobs, entropy = _of_logits(
            separate_logits(model, sequences)[mask], tokens, temperature, entropy_gradient, runner.backend
        )
    padded = torch.zeros(mask.shape, device=mask.device)
    return padded.masked_scatter(mask, logprobs), padded.masked_scatter(mask, entropy)


def logprobs_of_hidden(
    runner: "ModelRunner", hidden: Tensor, tokens: Tensor, temperature: float, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies, [K] float32, of tokens [K] predicted by hidden states [K, H]; see `token_logprobs`.

    The full logits never exist at once.
    """
    model, backend = runner.model, runner.backend
    most = max(1, backend.most_logits(hidden.device) // base_model(model).config.get_text_config().vocab_size)
    # Blocks of equal size: a small last block would read the whole weight for a few rows.
    count = max(1, -(-len(tokens) // most))
    pairs = list(zip(hidden.tensor_split(count), tokens.tensor_split(count), strict=True))
    weight = plain_projection(model)
    if weight is not None and not weight.requires_grad:
        options = (temperature, entropy_gradient, backend)
        blocks = [_Projected.apply(part, weight, ids, *options) for part, ids in pairs]
    else:
        weight = projection_weight(model)  # converted once instead of for each block

        def block(part: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
            return _of_logits(project(model, backend, part, weight), ids, temperature, entropy_gradient, backend)

        # Recomputed in the backward pass, so that one block's logits live at a time.
        compute = partial(checkpoint, block, use_reentrant=False) if torch.is_grad_enabled() else block
        blocks = [compute(part, ids) for part, ids in pairs]
    return torch.cat([values for values, _ in blocks]), torch.cat([values for _, values in blocks])


class _Projected(torch.autograd.Function):
    """Log-probability and entropy H under a frozen output layer.

    The forward pass already knows the gradients, up to one factor per token:

        d log p(token) / d hidden = (onehot(token) - p) W / temperature
        d H / d hidden = -p (log p + H) W / temperature

    So logits are computed once and not kept.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, entropy_gradient: bool, backend: Backend
    ) -> tuple[Tensor, Tensor]:
        weight = weight.to(product_dtype(weight))
        ctx.temperature, ctx.dtype, dtype = temperature, hidden.dtype, weight.dtype
        logits = backend.float_logits(hidden.to(dtype), weight) if dtype in HALF else F.linear(hidden, weight)
        if backend.usable(logits) and not entropy_gradient:
            wanted = ctx.needs_input_grad[0]
            result, entropy = kernels.token_logprobs(logits, tokens, temperature, slopes=wanted)
            if wanted:  # the operator overwrote the logits with their slopes
                with torch.autocast(hidden.device.type, enabled=False):
                    ctx.save_for_backward(logits.to(dtype) @ weight)
            ctx.mark_non_differentiable(entropy)
            return result, entropy
        logits = logits.float()
        with torch.autocast(hidden.device.type, enabled=False):
            logprobs = (logits if temperature == 1 else logits.div_(temperature)).log_softmax(dim=-1)
            del logits
            result = logprobs.gather(1, tokens[:, None]).squeeze(1)
            probabilities = logprobs.exp()
            entropy = -torch.linalg.vecdot(probabilities, logprobs)
            if ctx.needs_input_grad[0]:
                slopes = []
                if entropy_gradient:
                    slope = logprobs.add_(entropy[:, None]).mul_(probabilities).neg_()
                    slopes.append(slope.to(dtype) @ weight)
                del logprobs
                slope = probabilities.neg_()
                slope[torch.arange(len(tokens), device=tokens.device), tokens] += 1
                ctx.save_for_backward(slope.to(dtype) @ weight, *slopes)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return result, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        slopes = ctx.saved_tensors
        parts = [slope * (gradient[:, None] / ctx.temperature) for slope, gradient in zip(slopes, gradients, strict=False)]
        return sum(parts[1:], start=parts[0]).to(ctx.dtype), None, None, None, None, None


class _OfLogits(torch.autograd.Function):
    """Log-probability with a gradient, and entropy without one, computed by an operator."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        slopes = logits.clone(memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else logits.contiguous()
        result, entropy = kernels.token_logprobs(slopes, tokens, temperature, slopes=ctx.needs_input_grad[0])
        ctx.temperature = temperature
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(entropy)
        return result, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return (slopes * (gradient[:, None] / ctx.temperature)).to(slopes.dtype), None, None


def _of_logits(
    logits: Tensor, tokens: Tensor, temperature: float, entropy_gradient: bool, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Logits [K, V], tokens [K] -> log-probabilities [K] and entropies [K], float32; the same numbers as `_Projected`."""
    if backend.usable(logits) and not entropy_gradient:
        return _OfLogits.apply(logits, tokens, temperature)
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    logprobs = logits.log_softmax(dim=-1)
    del logits
    wanted = entropy_gradient and torch.is_grad_enabled()
    with torch.set_grad_enabled(wanted), torch.autocast(tokens.device.type, enabled=False):
        entropy = -torch.linalg.vecdot(logprobs.exp(), logprobs)
    return logprobs.gather(1, tokens[:, None]).squeeze(1), entropy
