"""What makes a model's passes fast: packing, attention, decoding, fused layers, log-probabilities; in `cpu/`, kernels in C++.

The other parts of the project use the names below, above all `Engine`. A name is imported at its first use, since some need PEFT,
which takes a second to import.
"""

from typing import TYPE_CHECKING

from hybrid_lightning.configurable import public_names

if TYPE_CHECKING:
    from hybrid_lightning.engine.activations import PassBytes, Rows, TokenSizes, Trained, activation_bytes, tokens_of_pass
    from hybrid_lightning.engine.attention import AttentionCalls, UnsupportedAttentionError
    from hybrid_lightning.engine.backend import Backend, PlannedBackend, has_operators
    from hybrid_lightning.engine.compiling import OneKernel
    from hybrid_lightning.engine.decoding import Decoding, decoding_of
    from hybrid_lightning.engine.engine import Engine, use_fused_modules
    from hybrid_lightning.engine.fused_layers import use_fused_layers
    from hybrid_lightning.engine.fused_lora import use_peft_lora
    from hybrid_lightning.engine.logprobs import logprobs_of_hidden, token_logprobs
    from hybrid_lightning.engine.packing import PackedSequences, begins_group
    from hybrid_lightning.engine.pass_memory import PassMemory
    from hybrid_lightning.engine.passes import base_model, default_token_budget, memory_of, own_hidden
    from hybrid_lightning.engine.segment_decoding import SegmentDecoding
    from hybrid_lightning.engine.shared_decoding import SharedPromptDecoding

__all__ = [
    "AttentionCalls",
    "Backend",
    "Decoding",
    "Engine",
    "OneKernel",
    "PackedSequences",
    "PassBytes",
    "PassMemory",
    "PlannedBackend",
    "Rows",
    "SegmentDecoding",
    "SharedPromptDecoding",
    "TokenSizes",
    "Trained",
    "UnsupportedAttentionError",
    "activation_bytes",
    "base_model",
    "begins_group",
    "decoding_of",
    "default_token_budget",
    "has_operators",
    "logprobs_of_hidden",
    "memory_of",
    "own_hidden",
    "token_logprobs",
    "tokens_of_pass",
    "use_fused_layers",
    "use_fused_modules",
    "use_peft_lora",
]

__getattr__ = public_names(
    __name__,
    {
        "activations": ("PassBytes", "Rows", "TokenSizes", "Trained", "activation_bytes", "tokens_of_pass"),
        "attention": ("AttentionCalls", "UnsupportedAttentionError"),
        "backend": ("Backend", "PlannedBackend", "has_operators"),
        "compiling": ("OneKernel",),
        "decoding": ("Decoding", "decoding_of"),
        "segment_decoding": ("SegmentDecoding",),
        "shared_decoding": ("SharedPromptDecoding",),
        "engine": ("Engine", "use_fused_modules"),
        "fused_layers": ("use_fused_layers",),
        "fused_lora": ("use_peft_lora",),
        "logprobs": ("logprobs_of_hidden", "token_logprobs"),
        "packing": ("PackedSequences", "begins_group"),
        "pass_memory": ("PassMemory",),
        "passes": ("base_model", "default_token_budget", "memory_of", "own_hidden"),
    },
)
