"""Whether a run fits on its devices, and the fewest changes that make it fit."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

from hybrid_lightning.adapters.budgets import ModuleBudget
from hybrid_lightning.errors import ConfigError, ModelError
from hybrid_lightning.memory.memory_table import COMPONENT_NAMES
from hybrid_lightning.memory.peaks import CONTEXT_BYTES, PROCESS_BYTES, SAMPLING, MethodMemory, plan_method
from hybrid_lightning.memory.settings import RunSettings
from hybrid_lightning.memory.sizes import format_bytes
from hybrid_lightning.memory.strategies import Components
from hybrid_lightning.model.quantization import NF4
from hybrid_lightning.rollout.vllm.in_process import VLLMSampler

_LEFT_SHARE = 0.05  # share of a GPU's memory that its allocator cannot use
_FEWEST_PROMPTS, _FEWEST_RANKS = 4, 4  # lower bounds of changes; with fewer prompts in a rollout a step's signal is weak
_GAIN = 0.99  # a change helps if it reduces the worst moment to less than this share
# Reduces training's memory, or moves the engine to other devices.
_OTHER_REMEDIES = (
    "quantize the base (model.quantization), split it over devices (trainer.strategy), or let servers on other devices sample "
    "(model.sampler=VLLMServerSampler)"
)


@dataclass(frozen=True)
class Saving:
    """A change of a run that saves memory."""

    overrides: str  # options for the command line
    cost: str  # the cost, for the user; may be "nothing"
    settings: Mapping[str, Any] = field(default_factory=dict)  # fields of `RunSettings`
    planning: Mapping[str, Any] = field(default_factory=dict)  # fields of `RunSettings.planning`


def room(settings: RunSettings) -> float | None:
    """Bytes that a run may take on each device, or on a CPU of its share of the machine; None if unknown."""
    memory, devices = settings.flags.device_bytes, settings.flags.sharding.devices
    if memory is None:
        return None
    return memory / devices if settings.flags.on_cpu else memory - max(CONTEXT_BYTES, _LEFT_SHARE * memory)


def taken(method: MethodMemory, settings: RunSettings) -> float:
    """Bytes that a run takes at its worst moment: the whole process on a CPU, else its tensors."""
    return method.process_bytes if settings.flags.on_cpu else method.peak_bytes


def verdict(method: MethodMemory, settings: RunSettings) -> str:
    """One line: whether a run fits with its own method, and the largest component at the worst moment."""
    free, needed, peak = room(settings), taken(method, settings), method.peaks[method.peak_phase]
    sums = {name: sum(getattr(peak, part) for part in parts) for name, parts in COMPONENT_NAMES.items()}
    part = max(sums, key=sums.__getitem__)
    phase, size = method.peak_phase, format_bytes(sums[part])
    about, full = "about " * settings.flags.on_cpu, f"if every completion has all {settings.completion_tokens} tokens"
    most = f"{method.method} takes up to {about}{format_bytes(needed)} {full}, most of it while {phase} ({part} {size})"
    memory = settings.flags.device_bytes
    if free is None or memory is None:
        return f"{most}; give --device_gib, the memory of a device in GiB, to see whether that fits"
    where = f"{format_bytes(free)} ({format_bytes(memory)} without the memory of its context and allocator)"
    if settings.flags.on_cpu:
        each = "" if (devices := settings.flags.sharding.devices) == 1 else f" (a {devices}th of the machine's memory)"
        where = f"{format_bytes(free)}{each}, {format_bytes(PROCESS_BYTES)} of it for Python and libraries"
    return f"{'Fits' if needed <= free else 'Does not fit'}: {most}, of {where}"


def why_not_fitting(settings: RunSettings, method: MethodMemory) -> str | None:
    """Why a run and its rollout engine do not fit on a GPU together, with the remedy, in one line; None if they do."""
    sampler, device, share = settings.sampler, settings.flags.device_bytes, method.share
    if settings.flags.on_cpu or device is None or not isinstance(sampler, VLLMSampler):
        return None
    training = {phase: peak.total - peak.engine for phase, peak in method.peaks.items()}
    free = device - CONTEXT_BYTES
    where = f"of {format_bytes(free)} ({format_bytes(device)} without the GPU's context)"
    given = f"sampler.gpu_memory_utilization={sampler.gpu_memory_utilization}"
    resting = max(training[phase] for phase in training if phase in SAMPLING)
    largest = math.floor(100 * (free - resting) / device) / 100
    smallest = math.ceil(100 * share.least / device) / 100
    change = "set sampler.gpu_memory_utilization={}" if 0 < smallest <= largest < 1 else _OTHER_REMEDIES
    if share.sampling < share.least:
        return (
            f"{given} of {format_bytes(device)} is less than the engine's weights with the KV cache of one completion, "
            f"{format_bytes(share.least)}; {change.format(smallest)}"
        )
    if resting + share.sampling > free:
        return (
            f"{given} does not fit: while completions are sampled, training keeps {format_bytes(resting)} and the engine takes "
            f"{format_bytes(share.sampling)}, {where}; {change.format(largest)}"
        )
    most, phase = max((training[phase], phase) for phase in training if phase not in SAMPLING)
    if share.updating and most + share.updating > free:
        frees = {"kv_cache": share.weights, "weights": 0.0} if sampler.sleep == "nothing" else {"weights": 0.0}
        fitting = [sleep for sleep, kept in frees.items() if most + kept <= free]
        remedy = f"set sampler.sleep={fitting[0]}" if fitting else f"lower model.max_tokens_per_micro_batch, {_OTHER_REMEDIES}"
        return (
            f"sampler.sleep={sampler.sleep} does not fit: while {phase}, training takes up to {format_bytes(most)} and the "
            f"engine keeps {format_bytes(share.updating)}, {where}; {remedy}"
        )
    return None


def find_changes(settings: RunSettings, needs_reference: bool) -> tuple[list[Saving], MethodMemory]:
    """The fewest changes that make a run fit, and the plan with them. If no changes are enough, that plan does not fit either.

    At the worst moment, take the cheapest change that helps; repeat until all moments fit. Then undo changes that turn out not to
    be needed, the most expensive first.
    The memory of the devices must be known. `needs_reference` is whether the loss compares with the start policy.

    Raises:
        ConfigError, ModelError: Like `plan_memory`, for the unchanged run.
    """
    free, kinds = room(settings), _kinds(settings, needs_reference)
    assert free is not None
    strengths = [0] * len(kinds)  # the chosen form of each kind, from 1; 0 for no change
    found = plan_method(settings)
    while taken(found, settings) > free:
        for stronger in _stronger(strengths, kinds):
            better = _planned(settings, _chosen(stronger, kinds))
            if better is not None and better.peaks.get(found.peak_phase, Components()).total < _GAIN * found.peak_bytes:
                strengths, found = stronger, better
                break
        else:
            return _chosen(strengths, kinds), found
    for kind in reversed(range(len(kinds))):
        while strengths[kind]:
            weaker = [*strengths[:kind], strengths[kind] - 1, *strengths[kind + 1 :]]
            same = _planned(settings, _chosen(weaker, kinds))
            if same is None or taken(same, settings) > free:
                break
            strengths, found = weaker, same
    return _chosen(strengths, kinds), found


def _stronger(strengths: list[int], kinds: list[list[Saving]]) -> Iterator[list[int]]:
    """Candidates: the next form of each kind, then the strongest of each (with a budget of zero nothing is scored)."""
    further = [(kind, strengths[kind] + 1) for kind, forms in enumerate(kinds) if strengths[kind] < len(forms)]
    for kind, strength in further + [(kind, len(kinds[kind])) for kind, following in further if following < len(kinds[kind])]:
        yield [*strengths[:kind], strength, *strengths[kind + 1 :]]


def _chosen(strengths: list[int], kinds: list[list[Saving]]) -> list[Saving]:
    return [forms[strength - 1] for forms, strength in zip(kinds, strengths, strict=True) if strength]


def _planned(settings: RunSettings, changes: list[Saving]) -> MethodMemory | None:
    """The plan with these changes; None if they cannot be combined, for example if prompts cannot be split."""
    for change in changes:
        settings = replace(settings, planning=replace(settings.planning, **change.planning), **change.settings)
    try:
        return plan_method(settings)
    except (ConfigError, ModelError):
        return None


def _kinds(settings: RunSettings, needs_reference: bool) -> list[list[Saving]]:
    """The kinds of changes, cheapest first, each with increasingly strong forms."""
    planning, schedule, sharding = settings.planning, settings.schedule, settings.flags.sharding
    cost = "nothing: no KL term needs them"
    kinds = [[Saving("--adapter.keep_start_weights=false", cost, {"keep_start_weights": False})]]
    kinds = [] if needs_reference or not settings.keep_start_weights else kinds
    counts, cost = _halves(settings.eval_prompts, 1), "time, in validations"
    kinds.append([Saving(f"--data.eval_batch_size={count}", cost, {"eval_prompts": count}) for count in counts])
    cost = "fewer problems in each step, so more steps for the same number"
    counts = _halves(schedule.prompts_per_rollout, max(_FEWEST_PROMPTS, sharding.devices))
    smaller = [replace(schedule, prompts_per_rollout=count) for count in counts]
    kinds.append([Saving(f"--model.prompts_per_rollout={one.prompts_per_rollout}", cost, {"schedule": one}) for one in smaller])
    cost, name = "a little time, in updates", "max_tokens_per_micro_batch"
    counts = _halves(settings.tokens_of_pass(), settings.prompt_tokens + settings.completion_tokens)
    kinds.append([Saving(f"--model.{name}={count}", cost, {name: count}) for count in counts])
    if not settings.gradient_checkpointing:
        cost = "a third more time, in updates"
        kinds.append([Saving("--model.gradient_checkpointing=true", cost, {"gradient_checkpointing": True})])
    if find_spec("bitsandbytes") is not None and sharding.parts == 1:  # FSDP2 cannot split bitsandbytes' state and weights
        from bitsandbytes.optim import AdamW8bit

        cost, fewer_bits = "a little precision, in the optimizer's state", replace(settings.optimization, optimizer=AdamW8bit)
        kinds.append([Saving("--model.optimizer=bitsandbytes.optim.AdamW8bit", cost, {"optimization": fewer_bits})])
        if settings.quantization is None and settings.flags.precision.endswith("mixed"):
            cost = "precision of the frozen weights, and time"
            kinds.append([Saving("--model.quantization=NF4", cost, {"quantization": NF4()})])
    if settings.plan is None and isinstance(planning.budget, ModuleBudget):
        cost = "the gain of full training over LoRA for these modules"
        budgets = [ModuleBudget(share) for share in (0.5, 0.1, 0.05, 0.0) if share < planning.budget.share]
        kinds.append([Saving(f"--adapter.budget.share={one.share}", cost, planning={"budget": one}) for one in budgets])
    if settings.plan is None and not planning.rank_pattern:
        loras = map(planning.lora.with_rank, _halves(planning.lora.rank, _FEWEST_RANKS))
        options = [(f"--adapter.rank={lora.rank} --adapter.alpha={lora.alpha:g}", lora) for lora in loras]
        kinds.append([Saving(overrides, "capacity of LoRA", planning={"lora": lora}) for overrides, lora in options])
    return kinds


def _halves(count: int, least: int) -> Iterator[int]:
    """A number halved repeatedly, down to `least`."""
    while count // 2 >= least:
        count //= 2
        yield count
