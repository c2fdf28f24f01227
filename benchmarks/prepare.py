"""Writes what both sides are given for each workload: a folder with model, tokenizer and `prompts.json`.

Prompts have exactly the wanted number of tokens. When completions end is a matter of the tokens that end them, which any engine
takes from the folder:

- full length always: the end-of-sequence token has a number beyond the vocabulary, so that it can never be sampled;
- by themselves: many rare tokens end a completion; their probabilities add up to the wanted one at each token, on average over
  completions sampled here.
"""

import copy
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from workloads import Workload

from hybrid_lightning.data import ProductSource
from hybrid_lightning.errors import HybridLightningError, ModelError
from hybrid_lightning.policy.loading import load_model, load_tokenizer, resolve_model

PROBE_ROWS = 16  # completions sampled to learn how probable each token is
COMMON_TOKENS = 100  # too probable each to end completions: the probability of ending would vary too much from token to token


def prepare(
    workload: Workload, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rollouts: int, seed: int
) -> list[str]:
    """Prompts, and the tokens that end completions set in model and tokenizer."""
    draw = random.Random(seed)
    if workload.stop_probability is not None:
        put_end_beyond_vocabulary(model, tokenizer)
    prompts = make_prompts(workload, tokenizer, workload.prompts * rollouts, draw)
    if workload.stop_probability:
        probabilities = token_probabilities(model, tokenizer, prompts[:PROBE_ROWS], workload.max_new_tokens, seed)
        model.generation_config.eos_token_id += ending_tokens(probabilities, workload.stop_probability, draw)
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
    """`count` prompts, all different for any real vocabulary.

    Raises:
        ModelError: If text of exactly the wanted number of tokens cannot be made with this tokenizer.
    """
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
    """Texts that are one token each and stay so side by side: words with a space in front, or else characters."""
    texts = [str(tokenizer.decode([token])) for token in range(min(len(tokenizer), 50_000))]
    single = [text for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True) if len(ids) == 1 + extra]
    words = [text for text in single if re.fullmatch(r" [A-Za-z]+", text)]
    return words or [text for text in single if len(text) == 1 and text.isprintable()]


def token_probabilities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], new_tokens: int, seed: int
) -> torch.Tensor:
    """Probability of each token [V], averaged over all positions of sampled completions."""
    torch.manual_seed(seed)
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in prompts])
    generate: Any = model.generate
    generated = generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=True,
        top_k=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack([logits.float().softmax(dim=-1).mean(dim=0) for logits in generated.logits]).mean(dim=0)


def ending_tokens(probabilities: torch.Tensor, wanted: float, draw: random.Random) -> list[int]:
    """Tokens, none of them common, that together have about the wanted probability."""
    rare = probabilities.argsort(descending=True)[COMMON_TOKENS:].tolist()
    draw.shuffle(rare)
    chosen: list[int] = []
    total = 0.0
    for token in rare:
        if total + float(probabilities[token]) <= wanted:
            chosen.append(token)
            total += float(probabilities[token])
    return sorted(chosen)


def main() -> None:
    """Argument: `{"workloads": [...], "folders": [...], "rollouts": N, "seed": N, "threads": N}`."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    loaded: dict[tuple[str, str], tuple[PreTrainedModel, PreTrainedTokenizerBase]] = {}
    for values, folder in zip(request["workloads"], map(Path, request["folders"]), strict=True):
        workload = Workload(**values)
        key = (workload.model, workload.dtype)
        if key not in loaded:
            source = resolve_model(workload.model)
            loaded[key] = (load_model(source, workload.dtype, None), load_tokenizer(source))
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
