"""Planned memory as a table, a column for each method."""

from collections.abc import Iterator, Sequence

from rich.table import Table

from hybrid_lightning.memory.moments import MethodMemory
from hybrid_lightning.memory.process import START
from hybrid_lightning.memory.settings import RunSettings
from hybrid_lightning.memory.strategies import Sharding

# Of `Parts`, with what they are called.
_PARTS = {
    "weights": ("weights",),
    "copies": ("copies", "packed"),
    "gradients": ("gradients",),
    "optimizer": ("optimizer",),
    "activations": ("activations",),
    "KV cache": ("cache",),
    "logits": ("logits",),
}


def rich_table(methods: Sequence[MethodMemory]) -> Table:
    """For the screen."""
    table = Table("")
    for method in methods:
        table.add_column(method.method, justify="right")
    for group in (parts(methods), moments(methods), totals(methods)):
        for name, cells in group:
            table.add_row(name, *cells)
        table.add_section()
    return table


def title(methods: Sequence[MethodMemory], settings: RunSettings, sharding: Sharding) -> str:
    """What is planned, in one line."""
    where = "CPU" if settings.on_cpu else "accelerator"
    name = f"{sharding.name} with CPU offload" if any(method.host for method in methods) else sharding.name
    devices = f"{name}, {where}" if sharding.devices == 1 else f"{name} on {sharding.devices} devices, {where}"
    return f"Memory of each device: {methods[0].parameters:,} parameters, {devices}, prompts of {settings.prompt_tokens} tokens"


def parts(methods: Sequence[MethodMemory]) -> Iterator[tuple[str, list[str]]]:
    """What is trained, and the largest that each part becomes."""
    yield "trained numbers", [f"{method.trainable:,}" for method in methods]
    for name, fields in _PARTS.items():
        yield name, [size(sum(getattr(method.largest, field) for field in fields)) for method in methods]


def moments(methods: Sequence[MethodMemory]) -> Iterator[tuple[str, list[str]]]:
    """What is there together in each moment."""
    names = {name: None for method in methods for name in method.moments}
    for name in names:
        yield name, [size(method.moments[name].total) if name in method.moments else "-" for method in methods]


def totals(methods: Sequence[MethodMemory]) -> Iterator[tuple[str, list[str]]]:
    """The most that is there together; on a CPU also by how much the process grows."""
    yield "tensors together", [size(method.peak) for method in methods]
    if all(method.growth is not None for method in methods):
        yield "growth of the process", [size(method.process) for method in methods]


def notes(methods: Sequence[MethodMemory], settings: RunSettings) -> str:
    """What the numbers mean, and what they leave out."""
    lines = [
        "First the largest that each part becomes, then what is there together in each moment, last the most of it. Completions "
        "have full length, every row is updated, and of a budget's choices the largest modules are taken: a run's tensors "
        "take at most this.",
        "copies: weights gathered from other devices, or packed for decoding on a CPU, and gradients in DDP's buckets.",
    ]
    if any(method.host for method in methods):
        hosts = ", ".join(f"{method.method} {size(method.host)}" for method in methods)
        lines.append(f"Weights, gradients and optimizer state that lie on the host take there, for each device: {hosts}.")
    if methods[0].growth is not None:
        lines.append(
            "tensors together leaves out torch, Python and all libraries. growth of the process has in it what comes with "
            "tensors: by so much its resident memory at the peak exceeds what it was before the model was loaded. That was about "
            f"{size(START)}, Python and libraries, where this was measured; each process takes both."
        )
    else:
        lines.append(
            "Not in it: the accelerator's context and torch's code there, about 0.5 GiB, and what the allocator keeps for itself."
        )
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes as a person reads them.

    Example:
        >>> size(0), size(81_920), size(3.2e9)
        ('-', '0.1 MiB', '2.98 GiB')
    """
    if count <= 0:
        return "-"
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"
