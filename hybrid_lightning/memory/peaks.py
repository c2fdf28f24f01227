"""The moments of a run at which it takes most, for full fine-tuning, LoRA and hybrid.

Planned memory as a table, a column for each method.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from rich.table import Table

from hybrid_lightning.adapters.budgets import Budget, ModuleBudget
from hybrid_lightning.adapters.candidates import find_candidates
from hybrid_lightning.adapters.plan import AdapterPlan
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.memory.process_growth import START, Growth, growth
from hybrid_lightning.memory.settings import RunSettings
from hybrid_lightning.memory.sizes import (
    FLOAT32,
    ModelSizes,
    OptimizerBytes,
    measure,
    meta_model,
    optimizer_bytes,
    plan_of_budget,
)
from hybrid_lightning.memory.strategies import FSDP1, Held, Sharding
from hybrid_lightning.rollout.loader import RolloutSchedule
from hybrid_lightning.rollout.sampler import check_positions

if TYPE_CHECKING:
    from hybrid_lightning.memory.pass_memory import Traced


@dataclass(frozen=True)
class Parts:
    """Bytes on one device, all of them there at the same moment."""

    weights: float = 0.0
    copies: float = 0.0  # of weights or gradients: gathered, or in buckets
    packed: float = 0.0  # copies of weights in the order or dtype in which decoding reads them
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    cache: float = 0.0  # keys and values while generating
    logits: float = 0.0

    @property
    def total(self) -> float:
        """The sum."""
        return sum(getattr(self, entry.name) for entry in fields(self))


@dataclass(frozen=True)
class MethodMemory:
    """What one method takes."""

    method: str
    parameters: int  # of the base model
    trainable: int
    moments: dict[str, Parts]
    host: float = 0.0  # bytes in the memory of the host, of what would else be on the device
    growth: Growth | None = None  # of the process, beside its tensors, on a CPU

    @property
    def peak_moment(self) -> str:
        """The name of the largest moment."""
        return max(self.moments, key=lambda name: self.moments[name].total)

    @property
    def peak(self) -> float:
        """Bytes of the largest moment."""
        return self.moments[self.peak_moment].total

    @property
    def process(self) -> float:
        """Bytes by which a process on a CPU grows: the tensors of a moment and what comes with them."""
        assert self.growth is not None, "only on a CPU do tensors lie in the memory of the process"
        return self.growth.total

    @property
    def largest(self) -> Parts:
        """The largest value of each part, which need not be there together."""
        names = (entry.name for entry in fields(Parts))
        return Parts(**{name: max(getattr(parts, name) for parts in self.moments.values()) for name in names})


def plan_memory(settings: RunSettings, sharding: Sharding) -> list[MethodMemory]:
    """What full fine-tuning, LoRA and hybrid take on each device; of several the first, which alone scores the modules.

    Completions are taken to have their full length, and every row an advantage; of a budget's choices that with the largest
    modules. So it is an upper bound for a run, and what a run with such completions takes.

    Raises:
        ConfigError: If the prompts cannot be dealt to the devices, or the optimizer cannot be asked.
        ModelError: If the model cannot be traced.
    """
    _check(settings, sharding)
    share = settings.budget.share
    budgets: dict[str, Budget] = {"FFT": ModuleBudget(1.0), "LoRA": ModuleBudget(0.0)}
    if settings.plan is not None:
        budgets["plan"] = settings.budget
    elif 0 < share < 1:
        budgets[f"hybrid {share:.0%}"] = settings.budget
    run = _Run(settings, sharding)
    return [run.method(name, budget) for name, budget in budgets.items()]


def _check(settings: RunSettings, sharding: Sharding) -> None:
    """Refuse what `fit` would."""
    minibatches = settings.micro_batches // settings.accumulate_grad_batches
    schedule = RolloutSchedule(settings.prompts_per_rollout, settings.samples_per_prompt, minibatches)
    schedule.check_split(settings.accumulate_grad_batches, sharding.devices)
    check_positions(settings.text_config, settings.prompt_tokens, settings.completion_tokens)
    if settings.quantization is not None and not sharding.whole_on_every_device:
        kind = type(settings.quantization).__name__
        raise ConfigError(f"model.quantization={kind} does not work with {sharding.name}; use trainer.strategy=ddp")
    if isinstance(sharding, FSDP1) and settings.dtype != settings.trained_dtype:
        raise ConfigError(
            f"FSDP1 wants one dtype, but trained weights are {settings.trained_dtype} and the others {settings.dtype}; use "
            "--config configs/strategy/fsdp2.yaml, model.dtype=float32, or model.dtype=bfloat16 with trainer.precision=bf16-true"
        )


class _Run:
    """What the methods share."""

    def __init__(self, settings: RunSettings, sharding: Sharding) -> None:
        self.settings, self.sharding = settings, sharding
        self.optimizer: OptimizerBytes = optimizer_bytes(settings.optimizer, settings.trained_dtype)
        self.candidates = find_candidates(meta_model(settings.config, settings.dtype), settings.target_modules)
        self.prompts = settings.prompts_per_rollout // sharding.devices
        from hybrid_lightning.memory.pass_memory import Traces, passes_of_step  # which import PEFT, which is slow

        self.traces = Traces(settings)
        self.passes = passes_of_step(settings, self.prompts)
        self.generated = {"generating": (self.prompts, settings.samples_per_prompt)}
        if settings.eval_prompts:
            self.generated["validating"] = (settings.eval_prompts, settings.eval_samples)

    def method(self, name: str, budget: Budget) -> MethodMemory:
        """All moments of a method."""
        settings = self.settings
        given = settings.plan if name == "plan" else None
        plan: AdapterPlan = given or plan_of_budget(self.candidates, budget, settings.lora)
        sizes = measure(settings, plan)
        moments = {label: self._generating(sizes, *counts) for label, counts in self.generated.items()}
        if given is None and budget.needs_scores:
            moments |= self._scoring(sizes)
        moments |= self._updating(sizes)
        host = self.sharding.forward(sizes, self.optimizer.state).host
        found = MethodMemory(name, sizes.parameters, sizes.trainable, moments, host)
        return replace(found, growth=self._growth(found, sizes)) if settings.on_cpu else found

    def _growth(self, found: MethodMemory, sizes: ModelSizes) -> Growth:
        batches = set(self.generated.values())
        if "validating" in self.generated:
            batches.add((self.settings.eval_prompts, 1))  # the greedy completions
        if "calibrating" in found.moments:
            batches.add((self._completed_together, self.settings.samples_per_prompt))
        split = not self.sharding.whole_on_every_device
        # Scoring comes before weights are split over processes.
        return max(
            (
                growth(self.settings, sizes, parts.total, batches, split and moment not in ("calibrating", "scoring"))
                for moment, parts in found.moments.items()
            ),
            key=lambda of_moment: of_moment.total,
        )

    @property
    def _calibration_prompts(self) -> int:
        return self.settings.calibration_prompts or self.settings.prompts_per_rollout

    @property
    def _completed_together(self) -> int:
        """Of the calibration prompts."""
        return min(self._calibration_prompts, self.settings.prompts_per_rollout)

    def _generating(self, sizes: ModelSizes, prompts: int, samples: int) -> Parts:
        held = self.sharding.generating(sizes, self.optimizer.state)
        return _parts(held, self.traces.decoding(prompts, samples, sizes.share_full))

    def _scoring(self, sizes: ModelSizes) -> dict[str, Parts]:
        """The first device has the base model as it is loaded, in one piece, and nothing else."""
        settings = self.settings
        base = sizes.parameters * settings.dtype.itemsize
        prompts = self._calibration_prompts
        generated = self.traces.decoding(self._completed_together, settings.samples_per_prompt, None)
        from hybrid_lightning.memory.pass_memory import passes_of_scoring  # as above

        longest = max(passes_of_scoring(settings, prompts), key=_tokens)
        # The sums of gradients are kept in the memory of the host.
        sums = settings.scoring_copies * FLOAT32 * sizes.candidates if settings.on_cpu else 0
        held = Held(base, sums, 0)
        return {
            "calibrating": _parts(Held(base, 0, 0), generated),
            "scoring": _largest((held, held, held), self.traces.update(longest, None)),
        }

    def _updating(self, sizes: ModelSizes) -> dict[str, Parts]:
        """Gradients of the last step are there until a pass of the next goes backward, or its second pass begins."""
        sharding, state = self.sharding, self.optimizer.state
        begin, forward, backward = (way(sizes, state) for way in (sharding.begin, sharding.forward, sharding.backward))
        first, *others = self.passes
        cleared = [replace(held, gradients=0) for held in (begin, forward, backward)]
        if self.settings.accumulate_grad_batches > 1:
            ways = (begin, forward, backward)
        else:
            ways = (cleared[0], cleared[1], cleared[2]) if others else (begin, forward, cleared[2])
        parts = [_largest(ways, self.traces.update(first, sizes.share_full))]
        if others:
            longest = self.traces.update(max(others, key=_tokens), sizes.share_full)
            parts.append(_largest((begin, forward, backward), longest))
        moments = {"updating": max(parts, key=lambda each: each.total)}
        step = self.optimizer.step * sizes.trainable / (1 if self.sharding.whole_on_every_device else self.sharding.devices)
        if step and not self.settings.on_cpu and not forward.host:
            moments["optimizer step"] = Parts(forward.weights, gradients=forward.gradients, optimizer=forward.optimizer + step)
        return moments


def _largest(ways: tuple[Held, Held, Held], traced: "Traced") -> Parts:
    """The largest of the beginning of a forward pass, the pass, and its backward pass."""
    begin, forward, backward = ways
    nothing = replace(traced, activations=0.0, logits=0.0)
    moments = [_parts(begin, nothing), _parts(forward, traced), _parts(backward, replace(nothing, activations=traced.backward))]
    return max(moments, key=lambda parts: parts.total)


def _parts(held: Held, traced: "Traced") -> Parts:
    return Parts(
        weights=held.weights,
        copies=held.copies,
        packed=traced.packed,
        gradients=held.gradients,
        optimizer=held.optimizer,
        activations=traced.activations,
        cache=traced.cache,
        logits=traced.logits,
    )


def _tokens(rows: object) -> int:
    return len(rows)  # type: ignore[arg-type]  # all rows have the same length


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
    for name, of_part in _PARTS.items():
        yield name, [size(sum(getattr(method.largest, field) for field in of_part)) for method in methods]


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
