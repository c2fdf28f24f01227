"""From planned and measured memory to the tables."""

from collections.abc import Iterable, Sequence
from typing import Any

METHODS = ("FFT", "LoRA", "hybrid 10%")
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "cache": "KV cache",
    "computed": "activations, logits",
    "tensors": "together",
}
MIB, GIB = 2**20, 2**30
GPU = 80e9  # bytes
MARGIN = 0.05  # of a GPU, for its context and what its allocator keeps for itself


def compared(run: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Part -> planned and measured bytes, each the largest of all moments; what oneDNN packs is in no tensor."""
    planned, measured = run["planned"], run["measured"]
    moments = [name for name in planned if name in measured]
    pairs: dict[str, tuple[float, float]] = {}
    for part in ("weights", "gradients", "optimizer", "cache"):
        trained = [name for name in moments if name not in ("calibrating", "scoring")]
        pairs[part] = (max(planned[name][part] for name in trained), max(measured[name][part] for name in trained))
    # Gradients come within an update, so that what it adds is told from them by its passes.
    pairs["computed"] = (
        planned["updating"]["activations"] + planned["updating"]["logits"],
        measured["updating"]["tensors"] - _persistent(run),
    )
    pairs["tensors"] = (
        max(planned[name]["total"] - planned[name]["packed"] for name in moments),
        max(measured[name]["tensors"] for name in moments),
    )
    pairs["process"] = (run["planned_process"], run["process"])
    return pairs


def _persistent(run: dict[str, Any]) -> float:
    """What is there in an update before anything is computed; gradients as planned."""
    found = run["measured"]["updating"]
    return float(found["weights"] + found["optimizer"] + min(run["planned"]["updating"]["gradients"], found["gradients"]))


def worst(runs: dict[str, Any]) -> float:
    """Largest difference of what is there together, tensors or process, as a share of what was measured."""
    pairs = [
        compared(run)[name] for model in runs.values() for run in model["methods"].values() for name in ("tensors", "process")
    ]
    return max(abs(planned / measured - 1) for planned, measured in pairs)


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown; all columns but the first are numbers."""
    marks = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, marks, *lines])


def markdown(result: dict[str, Any]) -> str:
    """The whole page."""
    versions = result["versions"]
    parts = [
        "# Memory, planned and measured",
        f"    {result['command']}",
        f"At commit `{versions['commit']}`, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"peft {versions['peft']}, on {result['machine']['processor']}, {result['threads']} thread(s) a process.",
        "`python -m hybrid_lightning plan --config ...` prints such numbers for any run, before anything is loaded.",
        "## Planned and measured",
        _MEASURED,
        *(section(name, run) for name, run in result["runs"].items()),
        f"The furthest that tensors together or process are from what was measured is {worst(result['runs']):.0%}.",
        "## Qwen3 on 80 GB GPUs",
        _QWEN3,
        qwen3_table(result["qwen3"]),
    ]
    return "\n\n".join(parts) + "\n"


def section(name: str, run: dict[str, Any]) -> str:
    """One model: planned / measured of every part, by method."""
    settings = run["settings"]
    header = [name, *PARTS.values(), "process"]
    lines = []
    for method, found in run["methods"].items():
        pairs = compared(found)
        lines.append([method, *(f"{pairs[part][0] / MIB:.1f} / {pairs[part][1] / MIB:.1f}" for part in [*PARTS, "process"])])
    about = (
        f"{settings['prompts']} x {settings['samples']} completions of {settings['max_new_tokens']} tokens, {settings['dtype']}, "
        f"LoRA of rank {settings['rank']}, {settings['minibatches']} optimizer step(s) a rollout:"
    )
    return f"{about}\n\n{table(header, lines)}"


def qwen3_table(lines: list[dict[str, Any]]) -> str:
    """A line for each model, strategy and method."""
    header = ["model", "GPUs", "method", "trainable", "weights", "copies", "packed", "gradients", "optimizer"]
    header += ["activations", "KV cache", "logits", "together", "while", "fits"]
    cells = []
    for line in lines:
        parts = [f"{value / GIB:.2f}" for value in line["parts"].values()]
        gpus = f"{line['devices']}" if line["devices"] == 1 else f"{line['devices']}, {line['strategy']}"
        fits = "yes" if line["peak"] <= (1 - MARGIN) * GPU else "no"
        peak = [f"{line['peak'] / GIB:.1f}", line["moment"], fits]
        cells.append([line["model"], gpus, line["method"], f"{line['trainable'] / 1e6:,.1f} M", *parts, *peak])
    return table(header, cells)


_MEASURED = """\
Each cell is planned / measured, in MiB. What was measured: three optimizer steps with scoring (hybrid), a validation before and
after them, every completion of full length and every row with an advantage. *Weights*, *gradients*, *optimizer* and *KV cache*
are the bytes of those tensors, *activations, logits* what an update computes beside them, and *together* the most bytes of
tensors that there were at any time of the run, counted at every operator. *Process* is the largest resident memory (VmHWM) in
these moments: Python, libraries, what malloc keeps for itself and weights packed by oneDNN included. The plan of hybrid takes
the largest modules to be chosen, since which ones are is not known before scoring, so its weights, gradients and optimizer
state are upper bounds."""

_QWEN3 = """\
GiB on each GPU, the largest of several; planned, not measured (no GPU was at hand). GSPO with the rollouts of
`configs/gsm8k_qwen3.yaml` (32 prompts of 384 tokens x 8 completions of 512, 4 minibatches x 8 accumulated), bfloat16 base, LoRA
of rank 16, AdamW, no KL term and no second copy of trained modules (`adapter.keep_start_weights=false`). *Together* is the most
at one time, *while* says when. Sizes of the models: `config.json` of Qwen/Qwen3-0.6B, -8B and -32B. *Fits* leaves 5% of 80 GB
to CUDA and its allocator. With FSDP2 every GPU gathers all weights while it generates (*copies*), and the first scores the
modules alone, on the whole model."""
