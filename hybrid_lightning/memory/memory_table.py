"""Show the planned memory of a run: a title, a table with a column for each method, and notes on its numbers."""

from collections.abc import Sequence
from dataclasses import replace

from rich.table import Table

from hybrid_lightning.memory.peaks import CONTEXT_BYTES, PROCESS_BYTES, MethodMemory, plan_method
from hybrid_lightning.memory.settings import RunSettings
from hybrid_lightning.memory.sizes import format_bytes
from hybrid_lightning.rollout.vllm.in_process import VLLMSampler

# Row of the table -> fields of `Components` that it adds up.
COMPONENT_NAMES = {
    "weights": ("weights",),
    "copies": ("copies", "packed"),
    "gradients": ("gradients",),
    "optimizer": ("optimizer",),
    "activations": ("activations",),
    "KV cache": ("cache",),
    "logits": ("logits",),
    "rollout engine": ("engine",),
    "teacher": ("teacher",),
}


def memory_title(methods: Sequence[MethodMemory], settings: RunSettings) -> str:
    """The planned run in one line."""
    sharding, where = settings.flags.sharding, "CPU" if settings.flags.on_cpu else "accelerator"
    name = f"{sharding.name} with CPU offload" if sharding.cpu_offload else sharding.name
    devices = f"{name}, {where}" if sharding.devices == 1 else f"{name} on {sharding.devices} devices, {where}"
    lengths = f"prompts of {settings.prompt_tokens} tokens, completions of {settings.completion_tokens}"
    return f"Memory of each device: {methods[0].parameters:,} parameters, {devices}, {lengths}"


def memory_table(methods: Sequence[MethodMemory], settings: RunSettings) -> Table:
    """Planned memory as a table for the screen, one column per method."""
    table = Table("")
    for method in methods:
        table.add_column(method.method, justify="right")
    table.add_row("trained numbers", *(f"{method.trainable:,}" for method in methods))
    for name, parts in COMPONENT_NAMES.items():  # largest value of each
        largest = [method.largest_components for method in methods]
        if name not in ("rollout engine", "teacher") or any(getattr(components, parts[0]) for components in largest):
            table.add_row(name, *(format_bytes(sum(getattr(components, part) for part in parts)) for components in largest))
    table.add_section()
    for phase in dict.fromkeys(phase for method in methods for phase in method.peaks):
        table.add_row(phase, *(format_bytes(method.peaks[phase].total) if phase in method.peaks else "-" for method in methods))
    table.add_section()
    table.add_row("tensors together", *(format_bytes(method.peak_bytes) for method in methods))
    if settings.flags.on_cpu:
        table.add_row("process", *(format_bytes(method.process_bytes) for method in methods))
    return table


def memory_notes(methods: Sequence[MethodMemory], settings: RunSettings) -> str:
    """Notes: what the numbers mean, and what they leave out."""
    lines = [
        "Top: the largest size of each part. Middle: the total in each phase. Bottom: the largest total. The plan assumes that "
        f"every completion has all {settings.completion_tokens} tokens, that every one of them is trained on, and that a budget "
        "chooses the largest modules. A run's tensors take at most this, and less if completions are shorter.",
        "copies: weights gathered from other devices, or packed for decoding on a CPU, and gradients in DDP's buckets.",
    ]
    if any(method.host for method in methods):
        hosts = ", ".join(f"{method.method} {format_bytes(method.host)}" for method in methods)
        lines.append(f"Weights, gradients and optimizer state on the host take, for each device: {hosts}.")
    if isinstance(settings.sampler, VLLMSampler):
        share = methods[0].share
        kept = format_bytes(share.updating) if share.updating else "nothing on the device, and its weights on the host,"
        slept = "" if settings.flags.on_cpu else f" (sampler.sleep={settings.sampler.sleep})"
        lines.append(
            f"rollout engine: {format_bytes(share.sampling)} while it samples, {format_bytes(share.weights)} of it for its copy "
            f"of the weights; it keeps {kept} while the policy is updated{slept}."
        )
    lines.append(
        f"process: all tensors, {format_bytes(PROCESS_BYTES)} for Python and libraries, and gaps between tensors (estimated: "
        "the process may take a sixth more); each process takes this much."
        if settings.flags.on_cpu
        else f"Not included: the accelerator's context and torch's code there, about {CONTEXT_BYTES / 2**30} GiB, and memory "
        "that the allocator reserves."
    )
    lines.extend(f"Bounded from above: {bound}." for bound in methods[0].bounds)
    return "\n".join(lines)


def gathers_note(own: MethodMemory, settings: RunSettings) -> str | None:
    """The bytes that passes receive from other devices, and the option that reduces them; None if weights are not sharded."""
    if not own.gathered:
        return None
    option, other = "with --model.gradient_checkpointing=true", replace(settings, gradient_checkpointing=True)
    if settings.max_tokens_per_micro_batch is not None:
        option, other = "without model.max_tokens_per_micro_batch", replace(settings, max_tokens_per_micro_batch=None)
    fewer = plan_method(other)
    remedy = f"; {option} {format_bytes(fewer.gathered)}, in {fewer.passes}" if fewer.passes < own.passes else ""
    sent = f"{format_bytes(own.gathered)} to each, in {own.passes} forward and backward passes per rollout"
    return f"Weights from other devices: {sent}{remedy}"
