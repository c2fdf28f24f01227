"""From planned and measured memory to the tables."""

from collections.abc import Iterable, Sequence
from typing import Any

import qwen3_report
from tables import table

PARTS = {"weights": "weights", "gradients": "gradients", "optimizer": "optimizer", "cache": "KV cache"}
MIB = 2**20


def summarize(found: dict[str, Any]) -> dict[str, Any]:
    """Planned and measured bytes of a case, each the largest of all moments, and of all ranks where several measured.

    What oneDNN packs is in no tensor that can be counted.
    """
    (plan,) = found["plan"]
    counted = [rank["moments"] for rank in found["tensors"]]
    planned = {name: parts["total"] - parts["packed"] for name, parts in plan["moments"].items()}
    measured = {name: max(rank[name]["tensors"] for rank in counted if name in rank) for rank in counted for name in rank}
    return {
        "bytes": [max(planned.values()), max(measured.values())],
        "moments": [max(planned, key=planned.__getitem__), max(measured, key=measured.__getitem__)],
        "growth": [plan["growth"], max(rank["growth"] for rank in found["process"])],
    }


def worst(cases: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Largest difference of bytes of tensors and of growth, as a share of what was measured."""
    return {name: max(abs(difference(case[name])) for case in cases) for name in ("bytes", "growth")}


def difference(pair: Sequence[float]) -> float:
    """Planned beside measured."""
    return pair[0] / pair[1] - 1


def markdown(result: dict[str, Any]) -> str:
    """The whole page."""
    versions, cases = result["versions"], result["cases"]
    whole = [case for case in cases if case["case"]["validates"]]
    furthest = worst(cases)
    parts = [
        "# Memory, planned and measured",
        f"    {result['command']}",
        f"At commit `{versions['commit']}`, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"peft {versions['peft']}, on {result['machine']['processor']}, {result['threads']} thread(s) a process.",
        "`python -m hybrid_lightning plan --config ...` prints such numbers for any run, before anything is loaded.",
        "## Planned and measured",
        _MEASURED,
        table(["model", "case", "tensors, MiB", "off by", "most while", "growth, MiB", "off by"], map(line, cases), left=2),
        f"Furthest from what was measured: tensors {furthest['bytes']:.0%}, growth of the process {furthest['growth']:.0%}.",
        "## Part by part",
        "Planned / measured, MiB, of the cases with validation:",
        table(["model", "case", *PARTS.values()], map(line_of_parts, whole), left=2),
        "## Qwen3 on 80 GB GPUs",
        qwen3_report.ABOUT,
        qwen3_report.long_table(result["qwen3"]),
    ]
    return "\n\n".join(parts) + "\n"


def line(case: dict[str, Any]) -> list[str]:
    """A case in the first table."""
    tensors, growth = case["bytes"], case["growth"]
    when = " / ".join(dict.fromkeys(case["moments"]))
    return [case["case"]["model"], case["name"], pair(tensors), off(tensors), when, pair(growth), off(growth)]


def line_of_parts(case: dict[str, Any]) -> list[str]:
    """A case in the second table; scoring has the base model alone."""
    sides = [case["plan"][0]["moments"], case["tensors"][0]["moments"]]
    cells = []
    for part in PARTS:
        trained = [[parts[part] for name, parts in side.items() if name not in ("calibrating", "scoring")] for side in sides]
        cells.append(pair([max(values) for values in trained]))
    return [case["case"]["model"], case["name"], *cells]


def pair(values: Sequence[float]) -> str:
    """Planned / measured, in MiB."""
    return f"{values[0] / MIB:,.1f} / {values[1] / MIB:,.1f}"


def off(values: Sequence[float]) -> str:
    """Planned beside measured, in percent."""
    return f"{difference(values):+.1%}"


_MEASURED = """\
A row is a run of two rollouts: P x G completions, prompt and completion tokens, every completion of full length and every row
with an advantage; hybrid scores its modules before, and the cases with validation validate before and after. Numbers are
planned / measured. *Tensors* is the most bytes of tensors that there were at any time, counted at every operator, on the rank
that had most; what oneDNN packs is in no tensor and not in it. *Most while* says when that was, and if another moment was
planned, both. *Growth* is by how much the process's resident memory at its peak (VmHWM), which has torch's code, libraries and
what the allocator keeps in it, exceeds what it was before the model was loaded, with everything imported; it is of another run,
in which nothing was counted. The plan of hybrid takes the largest modules to be chosen, since which ones are is not known before
scoring."""
