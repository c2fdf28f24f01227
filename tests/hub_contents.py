"""What the small hub has: tiny models of three families and the data sets of our presets, laid out as the real ones."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from hub_server import Hub
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

# Their kinds of templates, cut down to what a prompt of ours meets.
CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
HEADERS = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n' }}
{{- 'Today Date: ' + date_string + '\\n\\n' }}
{{- system_message + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
TURNS = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}
EOS_WEIGHT = 45.0  # by which nine of ten completions are empty
SPECIAL = {
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"],
    "llama": ["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    "gemma2": ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
}
# Template, tokens of the tokenizer, config class, tokens that end a completion.
FAMILIES = {
    "qwen3": (CHATML, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, Qwen3Config, ["<|im_end|>", "<|endoftext|>"]),
    "llama": (
        HEADERS,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        LlamaConfig,
        ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
    ),
    "gemma2": (
        TURNS,
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        Gemma2Config,
        ["<eos>", "<end_of_turn>"],
    ),
}


def write_model(folder: Path, family: str, template: bool = True, std: float = 0.2) -> Path:
    """A random model in shards, with a byte-level BPE trained here and the family's kind of chat template."""
    chat, tokens, config_class, ends = FAMILIES[family]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL[family], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([row["question"] for row in GSM8K] + [row["query"] for row in LEETCODE], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
    fast.chat_template = chat if template else None
    fast.save_pretrained(folder)
    ids = {name: fast.convert_tokens_to_ids(token) for name, token in tokens.items()}
    ids = {"bos_token_id": ids.get("bos_token"), "eos_token_id": ids["eos_token"], "pad_token_id": ids.get("pad_token")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(vocab_size=len(fast), tie_word_embeddings=True, **SIZES, **ids))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=std)
    if family == "qwen3":  # which writes programs, too
        _end_early(model, ids["eos_token_id"])
    model.generation_config.eos_token_id = [fast.convert_tokens_to_ids(token) for token in ends]
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
    return folder


def _end_early(model: Any, eos: int) -> None:
    """Make most completions empty, by a dimension that no layer writes to: random text is not worth a sandbox each time."""
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings[:, 0], embeddings[eos, 0] = 1.0, EOS_WEIGHT
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0], layer.mlp.down_proj.weight[0] = 0.0, 0.0


# Rows in the columns that the real data sets have, odd ones included.
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
MATH500 = [
    {
        "problem": problem,
        "solution": f"So $\\boxed{{{answer}}}$.",
        "answer": answer,
        "subject": "Precalculus",
        "level": 2,
        "unique_id": f"test/precalculus/{n}.json",
    }
    for n, (problem, answer) in enumerate(
        [
            ("Compute $1+\\frac{1}{2}$.", "\\frac{3}{2}"),  # stands in the training rows, too
            ("Convert the point $(0,3)$ to polar coordinates.", "\\left( 3, \\frac{\\pi}{2} \\right)"),
            ("Is $f$ even, odd or neither?", "\\text{even}"),
            ("Who ran fastest?", "\\text{Evelyn}"),
            ("Round to the nearest cent.", "\\$32,\\!348"),
            ("What angle?", "90^\\circ"),
        ]
    )
]
_PROBLEMS = [(f"Find $m+n$ where $\\frac{{m}}{{n}} = {n}$.", n + 1) for n in range(240)]
DAPO = [
    {
        "prompt": problem,
        "solution": str(answer),
        "data_source": "math_dapo",
        "source_prompt": [{"content": f"Solve the following math problem step by step.\n\n{problem}", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(answer), "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"9a9b6eb4-a1cb-49d1-8c1e-{answer:012d}"},
    }
    for problem, answer in [*_PROBLEMS, _PROBLEMS[0]]
]
AIME24 = [
    {
        "id": 60 + n,
        "problem": f"Every morning Aya goes for a ${n}$-kilometer walk.",
        "solution": "$\\boxed{073}$",
        "answer": f"{7 * n:03d}",
        "url": "https://artofproblemsolving.com/wiki/index.php/2024_AIME_I_Problems/Problem_4",
        "year": "2024",
    }
    for n in range(8)
]
AIME25 = [
    {"problem": f"Sum of all bases $b>{n}$?", "answer": "336^\\circ" if n == 5 else str(70 + n), "id": str(n)} for n in range(8)
]
AMC23 = [
    {"id": n, "question": f"How many miles, {n}?", "answer": n + 0.5 if n == 3 else float(n), "url": "https://a.b"}
    for n in range(8)
]
_OPTIONS = ["Safe", "Unsafe", "Fear", "Jealousy", "Distress", "Joy", "Trivial", "N/A", "N/A", "N/A"]
MMLU_PRO = [
    {
        "question_id": 70 + n,
        "question": f"Typical advertising bodies warn of {n} ...",
        "options": _OPTIONS[: 4 + n % 7],
        "answer": "ABCD"[n % 4],
        "answer_index": n % 4,
        "cot_content": "",
        "category": "business",
        "src": "ori_mmlu-business_ethics",
    }
    for n in range(45)
]
_SOLUTION = "class Solution:\n    def addN(self, x: int) -> int:\n        return x + {}\n"
LEETCODE = [
    {
        "task_id": f"add-{n}",
        "question_id": n,
        "difficulty": "Easy",
        "tags": ["Math", "Array"],
        "problem_description": f"Add {n}.",
        "starter_code": "class Solution:\n    def addN(self, x: int) -> int:\n        ",
        "estimated_date": "2015-08-07 00:00:00",
        "prompt": "import math\nfrom typing import *\nfrom collections import *\n\ninf = float('inf')\n",
        "completion": _SOLUTION.format(n),
        "entry_point": "Solution().addN",
        "test": f"def check(candidate):\n    assert candidate(x = 1) == {n + 1}\n    assert candidate(x = -1) == {n - 1}\n",
        "input_output": [{"input": "x = 1", "output": str(n + 1)}, {"input": "x = -1", "output": "None"}],
        "query": f"Add {n}.\n### Format: complete this.\n```python\nclass Solution:\n    def addN(self, x: int) -> int:\n```",
        "response": f"```python\n{_SOLUTION.format(n)}```",
    }
    for n in range(38)
]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _card(folder: Path, configs: dict[str, dict[str, str]]) -> None:
    lines = ["---", "license: mit", "configs:"]
    for name, files in configs.items():
        lines += [f"- config_name: {name}", *(["  default: true"] if name == "all" else []), "  data_files:"]
        lines += [line for split, path in files.items() for line in (f"  - split: {split}", f"    path: {path}")]
    (folder / "README.md").write_text("\n".join([*lines, "---", "", "# A data set", ""]))


def write_data_sets(folder: Path) -> dict[str, Path]:
    """Hub id -> folder of a repository."""
    at: dict[str, Path] = {}

    def repository(id: str) -> Path:
        at[id] = folder / id
        at[id].mkdir(parents=True)
        return at[id]

    gsm8k = repository("openai/gsm8k")
    for name in ("main", "socratic"):
        write_parquet(gsm8k / name / "train-00000-of-00001.parquet", GSM8K[:50])
        write_parquet(gsm8k / name / "test-00000-of-00001.parquet", GSM8K[50:])
    _card(gsm8k, {name: {split: f"{name}/{split}-*" for split in ("train", "test")} for name in ("main", "socratic")})
    math = repository("DigitalLearningGmbH/MATH-lighteval")
    write_parquet(math / "data" / "train-00000-of-00001.parquet", MATH[:50])
    write_parquet(math / "data" / "test-00000-of-00001.parquet", MATH[50:])
    _card(math, {"default": {split: f"data/{split}-*" for split in ("train", "test")}})
    math500 = repository("HuggingFaceH4/MATH-500")
    write_jsonl(math500 / "test.jsonl", MATH500)
    (math500 / "README.md").write_text("---\nlanguage:\n- en\n---\n\n# MATH-500\n")
    dapo = repository("open-r1/DAPO-Math-17k-Processed")
    for name, rows in (("all", DAPO), ("cn", DAPO[:10]), ("en", DAPO[10:])):
        write_parquet(dapo / name / "train-00000-of-00001.parquet", rows)
    _card(dapo, {name: {"train": f"{name}/train-*"} for name in ("all", "cn", "en")})
    aime24 = repository("HuggingFaceH4/aime_2024")
    write_parquet(aime24 / "data" / "train-00000-of-00001.parquet", AIME24)
    _card(aime24, {"default": {"train": "data/train-*"}})
    write_jsonl(repository("math-ai/aime25") / "test.jsonl", AIME25)  # has no card
    write_parquet(repository("math-ai/amc23") / "data" / "test-00000-of-00001.parquet", AMC23)
    mmlu = repository("TIGER-Lab/MMLU-Pro")
    write_parquet(mmlu / "data" / "test-00000-of-00001.parquet", MMLU_PRO[5:])
    write_parquet(mmlu / "data" / "validation-00000-of-00001.parquet", MMLU_PRO[:5])
    _card(mmlu, {"default": {split: f"data/{split}-*" for split in ("test", "validation")}})
    leetcode = repository("newfacade/LeetCodeDataset")
    write_jsonl(leetcode / "LeetCodeDataset-train.jsonl", LEETCODE[:35])
    write_jsonl(leetcode / "LeetCodeDataset-test.jsonl", LEETCODE[35:])
    (leetcode / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# LeetCodeDataset\n")
    return at


def fill(hub: Hub, folder: Path) -> Hub:
    """Make everything and put it on a hub."""
    qwen3 = write_model(folder / "models" / "qwen3", "qwen3")
    for id in ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B"):
        hub.add(id, "models", qwen3)
    hub.add("meta-llama/Llama-3.2-1B-Instruct", "models", write_model(folder / "models" / "llama", "llama"), gated=True)
    hub.add("google/gemma-2-2b-it", "models", write_model(folder / "models" / "gemma2", "gemma2"), gated=True)
    for id, repository in write_data_sets(folder / "datasets").items():
        hub.add(id, "datasets", repository)
    return hub


def fill_with_faults(hub: Hub, folder: Path) -> Hub:
    """Add what a user may run into: models that cannot be trained, and data sets that are closed, empty or programs."""

    def repository(kind: str, name: str, files: dict[str, str], **more: Any) -> None:
        place = folder / kind / "me" / name
        place.mkdir(parents=True)
        for file, text in files.items():
            (place / file).write_text(text)
        hub.add(f"me/{name}", kind, place, **more)

    base = write_model(folder / "models" / "base", "llama", template=False)
    hub.add("me/base", "models", base)
    hub.add("me/strict", "models", folder / "models" / "gemma2")
    hub.add("me/seen", "models", folder / "models" / "qwen3")
    hub.add("me/private", "models", base, private=True)
    hub.add("me/gated", "models", base, gated=True)
    cut = write_model(folder / "models" / "cut", "qwen3")
    sorted(cut.glob("*.safetensors"))[1].unlink()
    hub.add("me/cut", "models", cut)
    packed = {**json.loads((base / "config.json").read_text()), "quantization_config": {"quant_method": "gptq", "bits": 4}}
    tokenizer = {
        path.name: path.read_text()
        for path in (folder / "models" / "qwen3").iterdir()
        if "token" in path.name or "chat" in path.name
    }
    repository("models", "packed", {"config.json": json.dumps(packed), "model.safetensors": "", **tokenizer})
    repository("models", "encoder", {"config.json": '{"model_type": "t5"}', "model.safetensors": "", **tokenizer})
    repository("models", "gguf", {"README.md": "---\nlicense: mit\n---\n", "tiny.Q8_0.gguf": "GGUF"})
    hub.add("me/gated", "datasets", folder / "datasets" / "math-ai/amc23", gated=True)
    repository("datasets", "program", {"program.py": "import datasets\n"})
    repository("datasets", "empty", {"README.md": "# Nothing yet\n"})
    return hub
