"""Planned memory as a table: for the screen (rich) and for Markdown files."""

from collections.abc import Iterable, Sequence

from rich.table import Table

from hybrid_lightning.memory.moments import MethodMemory, Parts
from hybrid_lightning.memory.process import ALLOCATOR_SHARE, PROCESS_BYTES, process_bytes
from hybrid_lightning.memory.settings import RunSettings
from hybrid_lightning.memory.strategies import Sharding

_COLUMNS = (
    "method",
    "trainable",
    "weights",
    "copies",
    "gradients",
    "optimizer",
    "activations",
    "KV cache",
    "logits",
    "together",
    "while",
)


def rich_table(methods: Sequence[MethodMemory], settings: RunSettings, sharding: Sharding) -> Table:
    """One line a method."""
    table = Table(title=title(methods, settings, sharding), title_justify="left")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in ("method", "while") else "right")
    for cells in rows(methods):
        table.add_row(*cells)
    return table


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table; all columns but the first are numbers."""
    marks = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, marks, *lines]) + "\n"


def title(methods: Sequence[MethodMemory], settings: RunSettings, sharding: Sharding) -> str:
    """What is planned, in one line."""
    where = "CPU" if settings.on_cpu else "accelerator"
    name = f"{sharding.name} with CPU offload" if any(method.host for method in methods) else sharding.name
    devices = f"{name}, {where}" if sharding.devices == 1 else f"{name} on {sharding.devices} devices, {where}"
    return f"Memory of each device: {methods[0].parameters:,} parameters, {devices}, prompts of {settings.prompt_tokens} tokens"


def notes(methods: Sequence[MethodMemory], settings: RunSettings) -> str:
    """What the numbers mean, and what they leave out."""
    lines = [
        "Each part is the largest that it becomes; together is the most that is there at one time. Completions have full length, "
        "every row is updated, and of a budget's choices the largest modules are taken: a run takes at most this.",
        "copies: weights gathered from other devices, or packed for decoding on a CPU, and gradients in DDP's buckets.",
    ]
    if any(method.host for method in methods):
        hosts = ", ".join(f"{method.method} {size(method.host)}" for method in methods)
        lines.append(f"Weights, gradients and optimizer state that lie on the host take there, for each device: {hosts}.")
    if settings.on_cpu:
        processes = ", ".join(f"{m.method} {size(process_bytes(m.peak))}" for m in methods)
        lines.append(
            f"A process is larger than its tensors, by Python and libraries ({size(PROCESS_BYTES)}) and what the allocator keeps "
            f"for itself ({ALLOCATOR_SHARE:.0%} of tensors): {processes}."
        )
    else:
        lines.append("The accelerator's own context, about 0.5 GiB, and what its allocator keeps for itself are not in it.")
    return "\n".join(lines)


def rows(methods: Sequence[MethodMemory]) -> list[list[str]]:
    """The cells of each method: the largest value of each part, and what is there together at the largest moment."""
    return [
        [m.method, f"{m.trainable:,}", *(size(value) for value in _parts(m.largest)), size(m.peak), m.peak_moment]
        for m in methods
    ]


def size(count: float) -> str:
    """Bytes as a person reads them.

    Example:
        >>> size(0), size(81_920), size(3.2e9)
        ('-', '0.1 MiB', '2.98 GiB')
    """
    if count <= 0:
        return "-"
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def _parts(parts: Parts) -> list[float]:
    copies = parts.copies + parts.packed
    return [parts.weights, copies, parts.gradients, parts.optimizer, parts.activations, parts.cache, parts.logits]
