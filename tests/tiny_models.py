"""Tiny real models, built from config classes, and a tokenizer that needs no file from outside."""

from functools import partial
from weakref import WeakKeyDictionary

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hybrid_lightning.runner import ModelRunner
from hybrid_lightning.types import Sequences

_CHARACTERS = "0123456789+-*= \nabcdefghijklmnopqrstuvwxyz#?"
VOCABULARY = len(_CHARACTERS) + 3
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"vocab_size": VOCABULARY, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GPT2 = {"vocab_size": VOCABULARY, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 1, "eos_token_id": 2}
_CONFIGS = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,  # with biases
    "qwen3": partial(transformers.Qwen3Config, head_dim=8),
    "gemma": partial(transformers.GemmaConfig, head_dim=8),
    # With biases, and weights [inputs, outputs].
    "gpt2": lambda hidden_size, **_: transformers.GPT2Config(n_embd=hidden_size, **_GPT2),
}
FAMILIES = sorted(_CONFIGS)


def build_model(family: str, seed: int = 0, std: float = 0.2, biases: float = 0.0, **sizes: int) -> PreTrainedModel:
    """A random model with next-token distributions far from uniform, so that mistakes show."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_CONFIGS[family](**{**SIZES, **sizes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=std)
            elif biases:
                parameter.add_(biases * torch.randn(parameter.shape))
    return model.requires_grad_(False).eval()


def build_wide_model(family: str = "llama") -> PreTrainedModel:
    """A model with weights wide enough to be quantized: at least 64 inputs."""
    return build_model(family, std=0.15, biases=0.05, hidden_size=64, intermediate_size=128)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{c: i + 3 for i, c in enumerate(_CHARACTERS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def build_byte_tokenizer(eos_token: str = "<|endoftext|>") -> PreTrainedTokenizerFast:
    """One token per byte, and the special tokens of chat templates."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    special += ["<|eom_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>", "<bos>"]
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token=eos_token)


def plain_distribution(model: torch.nn.Module, sequences: Sequences, row: int, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities [T, V] at the tokens of one completion, by an unpadded forward pass."""
    prompt, completion = tokens_of(sequences, row)
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1)


def plain_logprobs(model: torch.nn.Module, sequences: Sequences, row: int, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities [T] of the tokens of one completion, by an unpadded forward pass."""
    chosen = torch.tensor(tokens_of(sequences, row)[1])[:, None]
    return plain_distribution(model, sequences, row, temperature).gather(1, chosen).squeeze(1)


def tokens_of(sequences: Sequences, row: int) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of its completion."""
    prompt, completion = sequences.prompt_ids[row], sequences.completion_ids[row]
    return prompt[sequences.prompt_mask[row]].tolist(), completion[sequences.completion_mask[row]].tolist()


_RUNNERS: WeakKeyDictionary[torch.nn.Module, ModelRunner] = WeakKeyDictionary()


def runner_of(model: torch.nn.Module) -> ModelRunner:
    """The runner of a model, the same at every call, so that it is tried once."""
    return _RUNNERS.setdefault(model, ModelRunner(model))
