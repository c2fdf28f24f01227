"""Writes the input of both sides for each workload: a folder with model, tokenizer and `prompts.json`.

Prompts have exactly the requested number of tokens. The stop tokens, which every engine reads from the folder, determine when
completions end:

- full length always: the end-of-sequence token has a number beyond the vocabulary, so that it can never be sampled;
- by themselves: many rare tokens end a completion, so many that the expected length is the wanted one, by their probabilities
  along completions sampled here.
"""

import copy
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.workloads import SMOLLM2, Workload
from hybrid_lightning.data import ProductSource
from hybrid_lightning.errors import HybridLightningError, ModelError
from hybrid_lightning.model.loading import load_model, load_tokenizer, resolve_model

# Random models in the shape of Qwen3.5, three layers of gated delta nets for each attention layer, with SmolLM2's tokenizer.
_DELTA = {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "tie_word_embeddings": True}
QWEN3_5 = {
    "qwen3_5:tiny": {
        **{"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 32},
        **{"num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 2, **_DELTA},
    },
    "qwen3_5:100m": {
        **{"hidden_size": 768, "intermediate_size": 1792, "num_hidden_layers": 12, "num_attention_heads": 6, "head_dim": 128},
        **{"num_key_value_heads": 2, "linear_num_key_heads": 8, "linear_num_value_heads": 8, **_DELTA},
    },
}
PROBE_ROWS = 16  # completions sampled to learn how probable tokens are
COMMON_TOKENS = 100  # these are too probable to end completions: the probability of ending would vary too much between tokens


def prepare(
    workload: Workload, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rollouts: int, seed: int
) -> list[str]:
    """Make prompts, and set the stop tokens in model and tokenizer."""
    draw = random.Random(seed)
    if workload.mean_tokens is not None:
        put_end_beyond_vocabulary(model, tokenizer)
    prompts = make_prompts(workload, tokenizer, workload.prompts * rollouts, draw)
    if workload.mean_tokens is not None and not workload.full_length:
        probabilities = token_probabilities(model, tokenizer, prompts[:PROBE_ROWS], workload.max_new_tokens, seed)
        model.generation_config.eos_token_id += ending_tokens(probabilities, workload.mean_tokens, draw)
    return prompts


def put_end_beyond_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer an end-of-sequence token that the model has no logit for."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    missing = model.config.vocab_size - len(tokenizer)
    tokenizer.add_tokens([f"<|unused_{number}|>" for number in range(missing)])
    tokenizer.add_special_tokens({"eos_token": "<|never|>"})
    assert tokenizer.eos_token_id >= model.config.vocab_size
    model.generation_config.eos_token_id = [tokenizer.eos_token_id]


def make_prompts(workload: Workload, tokenizer: PreTrainedTokenizerBase, count: int, draw: random.Random) -> list[str]:
    """`count` prompts, all different for any real vocabulary; ModelError if the vocabulary cannot give the requested length."""
    if workload.prompt_tokens is None:
        rows = ProductSource().read().train
        return [str(row.question) for row in draw.sample(rows, count)]
    extra = len(tokenizer("")["input_ids"])  # such as a token that begins every text
    words = single_tokens(tokenizer, extra)
    prompts = []
    for _ in range(100 * count):
        text = "".join(draw.choices(words, k=workload.prompt_tokens - extra)) if words else ""
        if len(tokenizer(text)["input_ids"]) == workload.prompt_tokens:
            prompts.append(text)
        if len(prompts) == count:
            return prompts
    raise ModelError(f"cannot write prompts of exactly {workload.prompt_tokens} tokens with this model's tokenizer; give another")


def single_tokens(tokenizer: PreTrainedTokenizerBase, extra: int) -> list[str]:
    """Texts that are one token each, also next to each other: words with a space in front, or else characters."""
    texts = [str(tokenizer.decode([token])) for token in range(min(len(tokenizer), 50_000))]
    single = [text for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True) if len(ids) == 1 + extra]
    words = [text for text in single if re.fullmatch(r" [A-Za-z]+", text)]
    return words or [text for text in single if len(text) == 1 and text.isprintable()]


def token_probabilities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], new_tokens: int, seed: int
) -> torch.Tensor:
    """Probability [rows, T, V] of each token at each position of completions sampled to full length."""
    torch.manual_seed(seed)
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in prompts])
    generate: Any = model.generate
    how = {"do_sample": True, "top_k": 0, "output_logits": True, "return_dict_in_generate": True}
    generated = generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **how)
    return torch.stack([logits.float().softmax(dim=-1) for logits in generated.logits], dim=1)


def ending_tokens(probabilities: torch.Tensor, mean_tokens: float, draw: random.Random) -> list[int]:
    """Rare tokens that, as stop tokens, give completions about the requested mean length.

    Args:
        probabilities: [rows, T, V] along completions that did not end.
        mean_tokens: The requested mean, counting the stop token.
        draw: Chooses the tokens.
    """
    rare = probabilities.mean(dim=(0, 1)).argsort(descending=True)[COMMON_TOKENS:].tolist()
    draw.shuffle(rare)
    few, many = 0, len(rare)  # the more tokens end a completion, the shorter it is
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if expected_length(probabilities, rare[:middle]) > mean_tokens else (few, middle)
    return sorted(rare[:many])


def expected_length(probabilities: torch.Tensor, ends: list[int]) -> float:
    """Mean length if these tokens end completions: 1 + the sum over positions of the probability of having passed them all."""
    passing = (1 - probabilities[..., ends].sum(dim=-1)).clamp(min=0).cumprod(dim=1)
    return 1 + float(passing[:, :-1].sum(dim=1).mean())


def load(workload: Workload) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a workload."""
    sizes = QWEN3_5.get(workload.model)
    source = resolve_model(SMOLLM2 if sizes else workload.model)
    tokenizer = load_tokenizer(source)
    if sizes is None:
        return load_model(source, workload.dtype, None), tokenizer
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_5_text", vocab_size=len(tokenizer), **sizes)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, workload.dtype))
    return model, tokenizer


def main() -> None:
    """Argument: `{"workloads": [...], "folders": [...], "rollouts": N, "seed": N, "threads": N}`."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    loaded: dict[tuple[str, str], tuple[PreTrainedModel, PreTrainedTokenizerBase]] = {}
    for values, folder in zip(request["workloads"], map(Path, request["folders"]), strict=True):
        workload = Workload(**values)
        key = (workload.model, workload.dtype)
        if key not in loaded:
            loaded[key] = load(workload)
        model, tokenizer = loaded[key][0], copy.deepcopy(loaded[key][1])
        generation_config = copy.deepcopy(model.generation_config)
        prompts = prepare(workload, model, tokenizer, request["rollouts"], request["seed"])
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "prompts.json").write_text(json.dumps(prompts))
        model.generation_config = generation_config


if __name__ == "__main__":
    try:
        main()
    except HybridLightningError as error:
        sys.exit(str(error))
