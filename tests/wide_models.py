"""Tiny models whose weights are wide enough to be quantized: 64 inputs at least."""

from pathlib import Path

import torch
from tiny_models import VOCABULARY, build_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel, Qwen2Config

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CONFIGS = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "qwen2": lambda: Qwen2Config(**_SIZES),  # with biases
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    ),  # with biases, and weights [inputs, outputs]
}
FAMILIES = sorted(_CONFIGS)


def build_wide_model(family: str = "llama") -> PreTrainedModel:
    """A random model whose next-token distributions are far from uniform."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_CONFIGS[family]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15) if parameter.dim() > 1 else parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.requires_grad_(False).eval()


def write_wide_model(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    """A model folder in Hugging Face format, with tokenizer."""
    build_wide_model(family).to(dtype).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder
