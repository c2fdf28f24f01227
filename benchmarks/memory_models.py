"""Worker: writes the models and prompts of the memory benchmark, a folder for each model in each dtype."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from memory_cases import SHAPES, MemoryCase
from prepare import make_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from workloads import SMOLLM2, Workload

from hybrid_lightning.assets import embedded_policy_path
from hybrid_lightning.policy.loading import load_model, load_tokenizer, resolve_model

PROMPTS = 128  # of each length


def write(root: Path, case: MemoryCase, seed: int) -> None:
    """Model, tokenizer and prompts, unless they are there."""
    folder = root / case.folder
    if not folder.exists():
        model, tokenizer = build(case, seed)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    prompts = folder / f"prompts_{case.prompt_tokens}.json"
    if not prompts.exists():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompts.write_text(json.dumps(texts(case, tokenizer, random.Random(seed))))


def build(case: MemoryCase, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2 with its tokenizer, and all others with that of the embedded policy: which tokens there are does not matter."""
    if case.model == "SmolLM2-135M":
        source = resolve_model(SMOLLM2)
        return load_model(source, case.dtype, None), load_tokenizer(source)
    tokenizer = AutoTokenizer.from_pretrained(embedded_policy_path())
    if case.model == "embedded":
        return load_model(resolve_model("embedded"), case.dtype, None), tokenizer
    kind, sizes = SHAPES[case.model]
    config: Any = getattr(transformers, kind)(**sizes)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype)), tokenizer


def texts(case: MemoryCase, tokenizer: PreTrainedTokenizerBase, draw: random.Random) -> list[str]:
    """Prompts of exactly the wanted length."""
    if case.model == "SmolLM2-135M":
        return make_prompts(Workload("memory", prompt_tokens=case.prompt_tokens), tokenizer, PROMPTS, draw)
    return ["".join(draw.choices("0123456789", k=case.prompt_tokens)) for _ in range(PROMPTS)]  # a token each


def main() -> None:
    """Argument: `{"cases": [{...}], "root": path, "seed": N}`."""
    request = json.loads(sys.argv[1])
    for values in request["cases"]:
        write(Path(request["root"]), MemoryCase(**values), request["seed"])


if __name__ == "__main__":
    main()
