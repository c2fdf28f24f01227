"""Plans the memory of GSPO with Qwen3-0.6B, 8B and 32B on 1 and 8 GPUs: `python -m benchmarks.memory.plan_qwen3`.

Needs only the models' configs, and takes seconds. Prints a table.
"""

from typing import Any

import torch
from transformers import Qwen3Config

from benchmarks.commands import command
from benchmarks.tables import table
from hybrid_lightning.callbacks import HybridAdapterSetup
from hybrid_lightning.memory import FSDP2, MethodMemory, RunSettings, Sharding, SingleDevice, TrainerFlags, plan_memory
from hybrid_lightning.rollout.loader import RolloutSchedule

# As in config.json of Qwen/Qwen3-0.6B, Qwen/Qwen3-8B and Qwen/Qwen3-32B on the Hugging Face hub (layers and heads are also in
# table 1 of the technical report, arXiv 2505.09388), and the number of parameters in billions that their model cards give.
NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings")
SIZES = {
    "Qwen3-0.6B": (1024, 3072, 28, 16, True, 0.6),
    "Qwen3-8B": (4096, 12288, 36, 32, False, 8.2),
    "Qwen3-32B": (5120, 25600, 64, 64, False, 32.8),
}
SAME = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960}
# The rollouts of configs/gsm8k_qwen3.yaml, without a KL term.
RUN: dict[str, Any] = {
    **{"schedule": RolloutSchedule(32, 8, minibatches_per_rollout=4), "prompt_tokens": 384, "completion_tokens": 512},
    **{"planning": HybridAdapterSetup(rank=16, alpha=32, calibration_prompts=32).planning, "keep_start_weights": False},
    **{"eval_prompts": 25, "eval_samples": 4, "dtype": torch.bfloat16},
}
SHARDINGS: dict[str, Sharding] = {"1 GPU": SingleDevice(), "8 GPUs, FSDP2": FSDP2(8)}
GIB = 2**30
USABLE = 0.95 * 80e9  # bytes of a GPU, without its context and what its allocator keeps for itself


def config(name: str) -> Qwen3Config:
    return Qwen3Config(**SAME, **dict(zip(NAMES, SIZES[name][:-1], strict=True)))


def plan(name: str, sharding: Sharding) -> list[MethodMemory]:
    flags = TrainerFlags(sharding, on_cpu=False, precision="bf16-mixed", accumulate_grad_batches=8)
    found, wanted = plan_memory(RunSettings(config=config(name), flags=flags, **RUN)), SIZES[name][-1]
    billions = found[0].parameters / 1e9
    assert abs(billions - wanted) < 0.05, f"{name} has {billions:.2f} billion parameters, which is not what its card says"
    return found


def main() -> None:
    """Print a line for each model and method: the peak memory, its phase, and whether the run fits."""
    command("memory.plan_qwen3", __doc__).parse_args()
    rows = []
    for name in SIZES:
        for same in zip(*(plan(name, sharding) for sharding in SHARDINGS.values()), strict=True):
            cells = []
            for found in same:
                cells += [f"{found.peak_bytes / GIB:.1f}, {found.peak_phase}", "yes" if found.peak_bytes <= USABLE else "no"]
            rows.append([name, same[0].method, f"{same[0].trainable / 1e6:,.0f} M", *cells])
    header = [text for gpus in SHARDINGS for text in (f"{gpus}: GiB, most while", "fits")]
    print(table(["model", "method", "trainable", *header], rows, left=2))


if __name__ == "__main__":
    main()
