"""How many tokens one forward and backward pass takes, where the user does not say.

More tokens at a time than keep the device busy only take memory. What a decoder keeps for the backward pass is, for each token
and layer, at most about 16 vectors of the hidden size and 5 of the feed-forward layer's (counted on transformers' Llama with LoRA
on all linear layers: 1.0 MB a token of SmolLM2-135M; `fused_layers` keep 0.46); with gradient checkpointing one of the hidden
size, and those of one layer.
"""

from typing import Any

import torch
from torch import nn

from hybrid_lightning.engine.passes import base_model, recomputes_activations

# Bytes to spend on activations. On a CPU 650 tokens at a time are as fast as 2,600 (SmolLM2-135M).
_ON_CPU = 0.68e9
_ON_ACCELERATOR = 8e9
_BYTES = 2  # of a number: activations are 16 bits wide under autocast, and float32 is for small models
_LEAST = 256


def default_token_budget(model: nn.Module, device: torch.device) -> int:
    """Tokens of a pass for this model: at least 256, and more the smaller the model is.

    Args:
        model: Causal language model, adapted or not.
        device: That computes; the weights may lie elsewhere.
    """
    text = base_model(model).config.get_text_config()
    return tokens_of_pass(text, recomputes_activations(model), device.type == "cpu")


def tokens_of_pass(config: Any, recomputes: bool, on_cpu: bool) -> int:
    """The same from the config of a language model.

    Args:
        config: Of the text model.
        recomputes: Whether gradient checkpointing is on.
        on_cpu: Or on an accelerator.
    """
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    layer = 16 * hidden + 5 * inner
    layers = config.num_hidden_layers
    numbers = layers * hidden + layer if recomputes else layers * layer
    return max(_LEAST, int((_ON_CPU if on_cpu else _ON_ACCELERATOR) / (numbers * _BYTES)))
