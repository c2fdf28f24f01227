"""The forward pass of a Hugging Face causal language model, padded or packed, shared by sampling and training."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, PreTrainedModel

from hybrid_lightning.runner.activations import activation_bytes, tokens_of_pass
from hybrid_lightning.runner.attention import Packing
from hybrid_lightning.runner.backend import HALF, Backend, autocast_dtype
from hybrid_lightning.types import Sequences


def base_model(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model itself, without a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, return-value]


def recomputes_activations(model: nn.Module) -> bool:
    """Whether gradient checkpointing is on."""
    base = base_model(model)
    name = "is_activation_checkpointing" if hasattr(base, "is_activation_checkpointing") else "is_gradient_checkpointing"
    return bool(getattr(base, name))


def position_ids(mask: Tensor) -> Tensor:
    """Positions [B, L] that count real tokens only, so left padding does not shift a prompt. Padding gets 0."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def last_logits(
    model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor, keep: int, cache: DynamicCache | None = None
) -> Tensor:
    """Logits [B, keep, V] at the last `keep` positions, in the model's dtype.

    Args:
        model: Causal language model.
        ids: Tokens [B, L] that are not in the cache yet.
        mask: [B, cached + L] bool, True on real tokens.
        positions: [B, L].
        keep: Number of positions, at most L. Other logits are never computed: for a long prompt they are the largest tensor.
        cache: Grows by `ids`; None for no cache.
    """
    accepted = inspect.signature(base_model(model).forward).parameters
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": cache is not None}
    if "position_ids" in accepted:
        arguments["position_ids"] = positions
    if "logits_to_keep" in accepted:
        # Indices, not a number: a number makes a slice that is not contiguous, and the output layer then multiplies row by row
        # (measured on a CPU in bfloat16: 5 s instead of 0.02 s for 50 prompts).
        arguments["logits_to_keep"] = torch.arange(ids.shape[1] - keep, ids.shape[1], device=ids.device)
    if cache is not None:
        arguments["cache" if "cache" in accepted else "past_key_values"] = cache  # the older name
    logits: Tensor = model(**arguments).logits
    return logits[:, -keep:]


def separate_logits(model: nn.Module, sequences: Sequences) -> Tensor:
    """Logits [B, T, V] before each completion token, every row with its own prompt, in a padded pass."""
    mask = torch.cat([sequences.prompt_mask, sequences.completion_mask], dim=1)
    ids = torch.cat([sequences.prompt_ids, sequences.completion_ids], dim=1)
    return last_logits(model, ids, mask, position_ids(mask), sequences.completion_ids.shape[1] + 1)[:, :-1]


def decoder_of(model: nn.Module) -> nn.Module:
    """The part of a model that makes hidden states."""
    base = base_model(model)
    decoder: nn.Module = base.get_decoder()
    # A few families do not find their decoder and return themselves.
    return decoder if decoder is not base else next(part for part in base.children() if isinstance(part, PreTrainedModel))


def own_hidden(model: nn.Module, ids: Tensor, positions: Tensor, packing: Packing, **options: Any) -> Tensor:
    """Hidden states [N, H] of N packed tokens before the output layer, by transformers' own forward pass of the decoder.

    The model's attention must use packings, and positions count within each sequence. Options reach the layers:
    `attention_calls` records what they request from attention.
    """
    arguments = {"packing": packing, "position_ids": positions[None], "attention_mask": no_mask(ids.device), **options}
    hidden: Tensor = decoder_of(model)(input_ids=ids[None], **arguments, use_cache=False)[0][0]
    return hidden


def no_mask(device: torch.device) -> Tensor:
    """A dummy attention mask that stops transformers from building one: four axes mean that the caller has built it."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def project(model: nn.Module, backend: Backend, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
    """Logits [N, V] of hidden states [N, H], as the model's own forward pass computes them.

    A 16-bit output layer gives float32 logits that were never rounded to 16 bits, unless it is not a plain linear layer. The
    weight is `projection_weight`; None computes it here.
    """
    base = base_model(model)
    layer: Any = base.get_output_embeddings()
    weight = projection_weight(model) if weight is None else weight
    logits: Tensor
    if weight is None or weight.dtype not in HALF:
        logits = layer(hidden)
    else:
        logits = _FloatLogits.apply(hidden.to(weight.dtype), weight, backend)
        logits = logits if layer.bias is None else logits + layer.bias
    factor, divisor, cap = _changes_of_logits(base)
    if factor is not None:
        logits = logits * factor
    if divisor is not None:
        logits = logits / divisor
    return logits if cap is None else torch.tanh(logits / cap) * cap


class _FloatLogits(torch.autograd.Function):
    """`Backend.float_logits` with gradients from 16-bit products, as in any other layer."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, backend: Backend) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return backend.float_logits(hidden, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight = ctx.saved_tensors
        gradient = gradient.to(weight.dtype)
        of_hidden, of_weight, _ = ctx.needs_input_grad
        return gradient @ weight if of_hidden else None, gradient.T @ hidden if of_weight else None, None


def projection_weight(model: nn.Module) -> Tensor | None:
    """The output layer's weight [V, H] in the dtype of products under the current autocast; None if the layer is not plain."""
    layer = base_model(model).get_output_embeddings()
    return layer.weight.to(product_dtype(layer.weight)) if type(layer) is nn.Linear else None


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of products with a weight under the current autocast."""
    return autocast_dtype(weight.device) or weight.dtype


def plain_projection(model: nn.Module) -> Tensor | None:
    """The output layer's weight [V, H] if `project` is just a product with it, else None."""
    base = base_model(model)
    layer = base.get_output_embeddings()
    plain = type(layer) is nn.Linear and layer.bias is None and _changes_of_logits(base) == (None, None, None)
    return layer.weight if plain else None  # type: ignore[union-attr, return-value]


def _changes_of_logits(base: PreTrainedModel) -> tuple[float | None, float | None, float | None]:
    """Factor, divisor and cap of logits after the output layer: Cohere and Falcon-H1 multiply, Granite divides, Gemma 2 caps."""
    config: Any = base.config.get_text_config()
    factor = getattr(base, "logit_scale", getattr(config, "lm_head_multiplier", None))
    return factor, getattr(config, "logits_scaling", None), getattr(config, "final_logit_softcapping", None)


def prepacked_projection(model: nn.Module, backend: Backend) -> Callable[[Tensor], Tensor]:
    """`project` without a gradient, for many calls with unchanged weights. It may hold a copy of the weight."""
    weight = plain_projection(model)
    if weight is None:
        return partial(project, model, backend, weight=projection_weight(model))
    dtype = product_dtype(weight)
    product = backend.projection(weight.detach().to(dtype))
    return lambda hidden: product(hidden.to(dtype))


def default_token_budget(model: nn.Module, device: torch.device, beside: Callable[[], int] = lambda: 0) -> int:
    """`tokens_of_pass` for a model: as many tokens as keep its device busy; more would only take memory.

    `device` computes; the weights may be sharded or on another device. On an accelerator `beside` returns the bytes of other
    models.
    """
    text = base_model(model).config.get_text_config()
    total = accelerator_memory(device)
    rest = None
    if total is not None:
        held = [part._local_tensor if isinstance(part, DTensor) else part for part in model.parameters()]
        weights = sum(part.numel() * part.element_size() for part in held)
        rest = activation_bytes(total, weights + beside(), sum(part.numel() for part in held if part.requires_grad))
    return tokens_of_pass(text, recomputes_activations(model), device.type == "cpu", rest)


def accelerator_memory(device: torch.device) -> int | None:
    """Bytes of memory of an accelerator; None for a CPU or where it is unknown."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
