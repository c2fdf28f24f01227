"""How a Hugging Face model is made to attend as a `Packing` says, through transformers' attention interface.

The sequences of a batch go through the model as one row of tokens without padding; everything in a decoder but attention treats
each token by itself. The model's attention layers call the function registered here, which hands queries, keys and values to
the packing that came with the call, or, for a call without one, to the implementation that the model had.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hybrid_lightning.engine.attention import AttentionSettings

_PREFIX = "packed_"
# Tensors among the arguments of an attention layer that say nothing about who attends to whom.
_HARMLESS = {"position_ids", "cache_position"}


class UnsupportedAttentionError(Exception):
    """A layer asks for something that a packing does not compute."""


class Packing(Protocol):
    """Who attends to whom in one row of tokens."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None, settings: AttentionSettings
    ) -> Tensor:
        """Attention of N tokens.

        Args:
            layer: Number of the decoder layer.
            query: [N, H, D].
            key: [N, K, D].
            value: [N, K, D].
            window: A token sees this many positions, itself included; None for all.
            settings: Of the layer.

        Returns:
            [N, H, D].
        """
        ...


@dataclass
class AttentionCalls:
    """What the layers asked for, recorded while a model is checked."""

    windows: list[int | None] = field(default_factory=list)
    settings: list[AttentionSettings] = field(default_factory=list)


def use_packing(model: PreTrainedModel) -> str:
    """Let the model's layers attend by packings; returns the implementation that it had, for `set_attn_implementation`.

    Raises:
        UnsupportedAttentionError: If the model does not call transformers' attention interface.
    """
    original = str(model.config._attn_implementation)
    if original.startswith(_PREFIX):
        return original.removeprefix(_PREFIX)
    name = _PREFIX + original
    AttentionInterface.register(name, _attention(original))
    if original in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    if not model._supports_attention_backend:
        raise UnsupportedAttentionError(f"{type(model).__name__} does not use transformers' attention interface")
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise UnsupportedAttentionError(f"{type(model).__name__} does not let its attention be set")
    return original


def _attention(original: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packing: Packing | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if packing is None:
            # "eager" is not registered: each model file has its own.
            eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
            function = ALL_ATTENTION_FUNCTIONS.get_interface(original, eager)
            result: tuple[Tensor, Tensor | None] = function(module, query, key, value, attention_mask, **options)
            return result
        calls = options.pop("attention_calls", None)
        window = options.pop("sliding_window", None)
        settings = _settings(options)
        if calls is not None:
            calls.windows.append(window)
            calls.settings.append(settings)
        # transformers: [1, heads, N, D] in, [1, N, heads, D] out
        query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
        return packing.attend(module.layer_idx, query, key, value, window, settings)[None], None  # type: ignore[arg-type]

    return attention


def _settings(options: dict[str, Any]) -> AttentionSettings:
    known = {name: options.pop(name) for name in ("scaling", "softcap", "dropout") if options.get(name) is not None}
    unknown = [name for name, value in options.items() if isinstance(value, (Tensor, nn.Parameter)) and name not in _HARMLESS]
    if unknown:
        raise UnsupportedAttentionError(f"its attention takes {unknown[0]}")
    return AttentionSettings(**known)


def no_mask(device: torch.device) -> Tensor:
    """An attention mask that makes transformers build none: four axes mean that the caller has made it."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
