"""From what is planned for Qwen3 to its tables."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from tables import table

GIB = 2**30
GPU = 80e9  # bytes
MARGIN = 0.05  # of a GPU, for its context and what its allocator keeps for itself
COLUMNS = {
    "weights": ("weights",),
    "copies": ("copies", "packed"),
    "gradients": ("gradients",),
    "optimizer": ("optimizer",),
    "activations": ("activations",),
    "KV cache": ("cache",),
    "logits": ("logits",),
}

ABOUT = """\
Planned by `python benchmarks/plan_qwen3.py`, not measured: no GPU was at hand. GiB on each GPU, of several the largest. GSPO
with the rollouts of `configs/gsm8k_qwen3.yaml` (32 prompts of 384 tokens x 8 completions of 512, 4 minibatches x 8 accumulated,
validation of 25 prompts x 4 completions on each GPU), bfloat16 base, LoRA of rank 16, AdamW, no KL term and no second copy of
trained modules (`adapter.keep_start_weights=false`). *Fits* leaves 5% of 80 GB to CUDA and its allocator. Sizes of the models:
`config.json` of Qwen/Qwen3-0.6B, -8B and -32B on the Hugging Face hub, typed in. With FSDP2 every GPU gathers all weights while
it generates (*copies*), and the first scores the modules alone, on the whole model."""


def short_table(lines: Sequence[dict[str, Any]]) -> str:
    """A line for each model and method: what is there together, and whether it fits."""
    header = ["model", "method", "trainable"]
    rows = []
    for (model, method), same in groupby(sorted(lines, key=_order(lines)), key=lambda line: (line["model"], line["method"])):
        gpus = list(same)
        cells = [(f"{line['peak'] / GIB:.1f}, {line['moment']}", fits(line)) for line in gpus]
        rows.append([model, method, _millions(gpus[0]), *(cell for pair in cells for cell in pair)])
        if len(header) == 3:
            header += [text for line in gpus for text in (f"{_gpus(line)}: GiB, most while", "fits")]
    return table(header, rows, left=2)


def long_table(lines: Sequence[dict[str, Any]]) -> str:
    """A line for each model, strategy and method: the largest that each part becomes."""
    rows = []
    for line in lines:
        parts = [f"{sum(line['parts'][part] for part in names) / GIB:.2f}" for names in COLUMNS.values()]
        end = [f"{line['peak'] / GIB:.1f}", line["moment"], fits(line)]
        rows.append([line["model"], _gpus(line), line["method"], _millions(line), *parts, *end])
    return table(["model", "GPUs", "method", "trainable", *COLUMNS, "together", "while", "fits"], rows, left=3)


def fits(line: dict[str, Any]) -> str:
    """On a GPU, with a margin."""
    return "yes" if line["peak"] <= (1 - MARGIN) * GPU else "no"


def _order(lines: Sequence[dict[str, Any]]) -> Any:
    """By model and method, as they come."""
    names = list(dict.fromkeys((line["model"], line["method"]) for line in lines))
    return lambda line: names.index((line["model"], line["method"]))


def _gpus(line: dict[str, Any]) -> str:
    return "1 GPU" if line["devices"] == 1 else f"{line['devices']} GPUs, {line['strategy']}"


def _millions(line: dict[str, Any]) -> str:
    return f"{line['trainable'] / 1e6:,.0f} M"
