"""Plans the memory of GSPO with Qwen3-0.6B, 8B and 32B on 1 and 8 GPUs, by their configs alone.

`python benchmarks/plan_qwen3.py` prints two tables in Markdown, in half a minute; with `--json` it prints the numbers.
"""

import argparse
import json
from dataclasses import asdict
from typing import Any

import torch
from qwen3_report import long_table, short_table
from transformers import Qwen3Config

from hybrid_lightning.adapters.lora_settings import LoraSettings
from hybrid_lightning.memory import FSDP2, RunSettings, Sharding, SingleDevice, plan_memory

# As in config.json of Qwen/Qwen3-0.6B, Qwen/Qwen3-8B and Qwen/Qwen3-32B on the Hugging Face hub (layers and heads are also in
# table 1 of the technical report, arXiv 2505.09388): hidden size, feed-forward size, layers, query heads, tied embeddings, and
# the number of parameters in billions that their model cards give.
SIZES = {
    "Qwen3-0.6B": (1024, 3072, 28, 16, True, 0.6),
    "Qwen3-8B": (4096, 12288, 36, 32, False, 8.2),
    "Qwen3-32B": (5120, 25600, 64, 64, False, 32.8),
}
# The rollouts of configs/gsm8k_qwen3.yaml, without a KL term.
RUN: dict[str, Any] = {
    "prompt_tokens": 384,
    "completion_tokens": 512,
    "prompts_per_rollout": 32,
    "samples_per_prompt": 8,
    "micro_batches": 4 * 8,
    "accumulate_grad_batches": 8,
    "eval_prompts": 25,
    "eval_samples": 4,
    "calibration_prompts": 32,
    "dtype": torch.bfloat16,
    "mixed_precision": True,
    "on_cpu": False,
    "keep_start_weights": False,
    "lora": LoraSettings(16, 32),
}


def qwen3(name: str) -> Qwen3Config:
    """The config of a dense Qwen3 model."""
    hidden, inner, layers, heads, tied, _ = SIZES[name]
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tied,
        max_position_embeddings=40960,
    )


def plan(name: str, sharding: Sharding) -> list[dict[str, Any]]:
    """All methods of a model."""
    found = plan_memory(RunSettings(config=qwen3(name), **RUN), sharding)
    billions = found[0].parameters / 1e9
    assert abs(billions - SIZES[name][5]) < 0.05, f"{name} has {billions:.2f} billion parameters, which is not what its card says"
    return [
        {
            "model": name,
            "devices": sharding.devices,
            "strategy": sharding.name,
            "method": method.method,
            "parameters": method.parameters,
            "trainable": method.trainable,
            "parts": asdict(method.largest_components),
            "peak": method.peak_bytes,
            "moment": method.peak_phase,
            "moments": {phase: peak.total for phase, peak in method.peaks.items()},
        }
        for method in found
    ]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="plan_qwen3.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON, in one line")
    given = parser.parse_args()
    lines = [line for name in SIZES for sharding in (SingleDevice(), FSDP2(8)) for line in plan(name, sharding)]
    print(json.dumps(lines) if given.json else f"{short_table(lines)}\n\n{long_table(lines)}")


if __name__ == "__main__":
    main()
