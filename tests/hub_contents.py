"""Contents of the small hub: tiny models of two families and the data sets of our presets, in the layout of the real ones."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedTokenizerFast, Qwen3Config

FILES = Path(__file__).with_name("hub_files")  # chat templates, cut down to what a prompt of ours meets, and rows of few problems
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 4096}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
EOS_WEIGHT = 45.0  # by which nine of ten completions are empty
# Special tokens, the tokenizer's named tokens among them, the config's class, and tokens that end a completion.
FAMILIES = {
    "qwen3": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"],
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        Qwen3Config,
        ["<|im_end|>", "<|endoftext|>"],
    ),
    "gemma2": (
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        Gemma2Config,
        ["<eos>", "<end_of_turn>"],
    ),
}


def write_model(folder: Path, family: str) -> Path:
    """A random model in shards, with a byte-level BPE trained here and the family's kind of chat template."""
    special, tokens, config_class, ends = FAMILIES[family]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([row["question"] for row in GSM8K] + [row["query"] for row in LEETCODE], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
    fast.chat_template = (FILES / f"{family}.jinja").read_text()
    fast.save_pretrained(folder)
    ids = {name: fast.convert_tokens_to_ids(token) for name, token in tokens.items()}
    ids = {"bos_token_id": ids.get("bos_token"), "eos_token_id": ids["eos_token"], "pad_token_id": ids.get("pad_token")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(vocab_size=len(fast), tie_word_embeddings=True, **SIZES, **ids))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    if family == "qwen3":  # which writes programs, too
        _end_early(model, ids["eos_token_id"])
    model.generation_config.eos_token_id = [fast.convert_tokens_to_ids(token) for token in ends]
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
    return folder


def _end_early(model: Any, eos: int) -> None:
    """Make most completions empty, by a dimension that layers hardly write to: random text is not worth a sandbox each time."""
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings[:, 0], embeddings[eos, 0] = 1.0, EOS_WEIGHT
        for layer in model.model.layers:
            # Not 0: DoRA divides by the norm of a row.
            layer.self_attn.o_proj.weight[0], layer.mlp.down_proj.weight[0] = 1e-6, 1e-6


# Rows with columns of the real data sets, odd ones included: the first problem of MATH-500 stands in MATH, too.
MATH500, AIME24, AIME25, AMC23 = (
    [json.loads(line) for line in (FILES / f"{name}.jsonl").read_text().splitlines()]
    for name in ("math500", "aime24", "aime25", "amc23")
)
_NAMES = ["Tom", "Natalia", "Weng", "Betty", "Mark"]
GSM8K = [
    {
        "question": f"{_NAMES[n % 5]} has {n} pens and gets {n + 2:,} more. How many pens in total?",
        "answer": f"He has {n}+{n + 2}=<<{n}+{n + 2}={2 * n + 2}>>{2 * n + 2} pens.\n#### {2 * n + 2:,}",
    }
    for n in [*range(60), 1000, 2500]
]
MATH = [
    {
        "problem": f"Compute ${n}+\\frac{{1}}{{2}}$.",
        "level": "Level ?" if n == 3 else f"Level {1 + n % 5}",
        "type": "Counting & Probability",
        "solution": f"It is $\\boxed{{\\frac{{{2 * n + 1}}}{{2}}}}$.",
    }
    for n in range(60)
]
_PROBLEMS = [(f"Find $m+n$ where $\\frac{{m}}{{n}} = {n}$.", n + 1) for n in range(240)]
DAPO = [
    {
        "prompt": problem,
        "solution": str(answer),
        "source_prompt": [{"content": f"Solve the following math problem step by step.\n\n{problem}", "role": "user"}],
        "reward_model": {"ground_truth": str(answer), "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"9a9b6eb4-a1cb-49d1-8c1e-{answer:012d}"},
    }
    for problem, answer in [*_PROBLEMS, _PROBLEMS[0]]
]
_OPTIONS = ["Safe", "Unsafe", "Fear", "Jealousy", "Distress", "Joy", "Trivial", "N/A", "N/A", "N/A"]
MMLU_PRO = [
    {
        "question_id": 70 + n,
        "question": f"Typical advertising bodies warn of {n} ...",
        "options": _OPTIONS[: 4 + n % 7],
        "answer": "ABCD"[n % 4],
        "answer_index": n % 4,
        "category": "business",
    }
    for n in range(45)
]
_SOLUTION = "class Solution:\n    def addN(self, x: int) -> int:\n        return x + {}\n"
LEETCODE = [
    {
        "task_id": f"add-{n}",
        "tags": ["Math", "Array"],
        "prompt": "import math\nfrom typing import *\nfrom collections import *\n\ninf = float('inf')\n",
        "completion": _SOLUTION.format(n),
        "entry_point": "Solution().addN",
        "test": f"def check(candidate):\n    assert candidate(x = 1) == {n + 1}\n    assert candidate(x = -1) == {n - 1}\n",
        "input_output": [{"input": "x = 1", "output": str(n + 1)}, {"input": "x = -1", "output": "None"}],
        "query": f"Add {n}.\n### Format: complete this.\n```python\nclass Solution:\n    def addN(self, x: int) -> int:\n```",
    }
    for n in range(38)
]


_GSM8K = {"train": GSM8K[:50], "test": GSM8K[50:]}
# Hub id -> file -> rows. A parquet file is named "configuration/split"; the configuration "data" is the default.
DATA_SETS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "openai/gsm8k": {f"{name}/{split}": rows for name in ("main", "socratic") for split, rows in _GSM8K.items()},
    "DigitalLearningGmbH/MATH-lighteval": {"data/train": MATH[:50], "data/test": MATH[50:]},
    "HuggingFaceH4/MATH-500": {"test.jsonl": MATH500},
    "open-r1/DAPO-Math-17k-Processed": {"all/train": DAPO, "cn/train": DAPO[:10], "en/train": DAPO[10:]},
    "HuggingFaceH4/aime_2024": {"data/train": AIME24},
    "math-ai/aime25": {"test.jsonl": AIME25},
    "math-ai/amc23": {"data/test": AMC23},
    "TIGER-Lab/MMLU-Pro": {"data/test": MMLU_PRO[5:], "data/validation": MMLU_PRO[:5]},
    "newfacade/LeetCodeDataset": {"LeetCodeDataset-train.jsonl": LEETCODE[:35], "LeetCodeDataset-test.jsonl": LEETCODE[35:]},
}


def _write(folder: Path, files: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Files of a repository; returns its card's metadata."""
    configs: dict[str, list[dict[str, str]]] = {}
    for name, rows in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), f"{path}-00000-of-00001.parquet")
            configs.setdefault(path.parent.name, []).append({"split": path.name, "path": f"{name}-*"})
    listed = [{"config_name": name.replace("data", "default"), "data_files": parts} for name, parts in configs.items()]
    for config in listed:
        if config["config_name"] == "all":
            config["default"] = True
    return {"license": "mit", **({"configs": listed} if listed else {})}


def write_data_sets(folder: Path) -> dict[str, Path]:
    """Hub id -> folder of a repository."""
    for id, files in DATA_SETS.items():
        card = _write(folder / id, files)
        (folder / id / "README.md").write_text(f"---\n{yaml.safe_dump(card, sort_keys=False)}---\n\n# A data set\n")
    return {id: folder / id for id in DATA_SETS}
