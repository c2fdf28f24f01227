"""Whether a run fits on its devices, and the fewest changes with which it does."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hybrid_lightning.adapters.budgets import ModuleBudget
from hybrid_lightning.errors import ConfigError, ModelError
from hybrid_lightning.memory.engine_share import CONTEXT_BYTES
from hybrid_lightning.memory.memory_table import COMPONENT_NAMES, format_bytes
from hybrid_lightning.memory.peaks import MethodMemory, plan_method
from hybrid_lightning.memory.process_growth import START_BYTES
from hybrid_lightning.memory.settings import RunSettings
from hybrid_lightning.memory.strategies import FSDP2, Sharding

if TYPE_CHECKING:
    from hybrid_lightning.memory.pass_memory import Traces

_LEFT_SHARE = 0.05  # of a GPU, which its allocator cannot use
_FEWEST_PROMPTS = 4  # in a rollout, below which a step says little
_FEWEST_RANKS = 4
_GAIN = 0.99  # a change helps if the worst moment takes less than this share of what it took

_UPDATING = ("updating", "scoring")


@dataclass(frozen=True)
class Change:
    """A change of a run that saves memory."""

    overrides: tuple[str, ...]  # as they are given on the command line
    cost: str  # what it costs, or that it costs nothing
    settings: dict[str, Any]  # fields of `RunSettings`

    @classmethod
    def of(cls, option: str, value: Any, cost: str, **settings: Any) -> "Change":
        """With one override."""
        return cls((f"--{option}={value}",), cost, settings)


def room(settings: RunSettings, sharding: Sharding) -> float | None:
    """Bytes that a run may take of each device, on a CPU of its share of the machine; None where that is not known."""
    if settings.device_bytes is None:
        return None
    if settings.on_cpu:
        return settings.device_bytes / sharding.devices - START_BYTES
    return settings.device_bytes - max(CONTEXT_BYTES, _LEFT_SHARE * settings.device_bytes)


def taken(method: MethodMemory) -> float:
    """Bytes that a run takes at its worst moment."""
    return method.peak_bytes if method.growth is None else method.growth_bytes


def verdict(method: MethodMemory, settings: RunSettings, sharding: Sharding) -> str:
    """Whether a run fits by its own method, and what takes most at the worst moment, in one line."""
    free = room(settings, sharding)
    peak = method.peaks[method.peak_phase]
    sums = {name: sum(getattr(peak, part) for part in parts) for name, parts in COMPONENT_NAMES.items()}
    part = max(sums, key=sums.__getitem__)
    largest = f"{part} {format_bytes(sums[part])}"
    most = f"{method.method} takes up to {format_bytes(taken(method))}, most of it while {method.peak_phase} ({largest})"
    if free is None:
        return f"{most}; give --device_gib, the memory of a device in GiB, for whether that fits"
    assert settings.device_bytes is not None
    whole = format_bytes(settings.device_bytes)
    if settings.on_cpu:
        each = "" if sharding.devices == 1 else f", a {sharding.devices}th of the machine's memory"
        where = f"{format_bytes(free)} (of {whole}{each}, without {format_bytes(START_BYTES)} for Python and libraries)"
    else:
        where = f"{format_bytes(free)} ({whole} without what its context and its allocator take)"
    return f"{'Fits' if taken(method) <= free else 'Does not fit'}: {most}, of {where}"


class Fitting:
    """Looks for the fewest changes with which a run fits.

    At the worst moment the cheapest change that helps is made, as far as is needed, until all moments fit. Of the changes made
    those are then taken back, dearest first, without which it fits as well.
    The settings have the memory of the devices, and `needs_reference` says whether the loss compares with the start policy.
    """

    def __init__(self, settings: RunSettings, sharding: Sharding, needs_reference: bool) -> None:
        self.settings, self.sharding = settings, sharding
        free = room(settings, sharding)
        assert free is not None
        self._free: float = free
        self._traces: dict[tuple[Any, ...], Traces] = {}  # of each model, whatever the numbers of prompts and tokens
        self._kinds = _kinds(settings, sharding, needs_reference)

    def search(self) -> tuple[list[Change], MethodMemory]:
        """The changes, and the plan with them; which does not fit either if no changes are enough.

        Raises:
            ConfigError, ModelError: As `plan_memory`, for the run as it is.
        """
        strengths = [0] * len(self._kinds)  # how many forms of each kind are used up: 0 for no change
        found = self._planned(strengths)
        assert found is not None
        while taken(found) > self._free:
            for stronger in self._stronger(strengths, found.peak_phase):
                better = self._planned(stronger)
                if better is not None and _total(better, found.peak_phase) < _GAIN * found.peak_bytes:
                    strengths, found = stronger, better
                    break
            else:
                return self._changes(strengths), found
        for kind in reversed(range(len(strengths))):
            while strengths[kind]:
                weaker = [*strengths[:kind], strengths[kind] - 1, *strengths[kind + 1 :]]
                same = self._planned(weaker)
                if same is None or taken(same) > self._free:
                    break
                strengths, found = weaker, same
        return self._changes(strengths), found

    def _stronger(self, strengths: list[int], phase: str) -> Iterator[list[int]]:
        """The next form of each kind that may help at a moment, and then the strongest: without any budget nothing is scored."""
        useful = [
            (kind, strengths[kind] + 1, len(forms))
            for kind, (phases, forms) in enumerate(self._kinds)
            if strengths[kind] < len(forms) and (phases is None or phase in phases)
        ]
        further = [(kind, following) for kind, following, _ in useful]
        for kind, strength in further + [(kind, last) for kind, following, last in useful if last > following]:
            yield [*strengths[:kind], strength, *strengths[kind + 1 :]]

    def _changes(self, strengths: list[int]) -> list[Change]:
        return [forms[strength - 1] for (_, forms), strength in zip(self._kinds, strengths, strict=True) if strength]

    def _planned(self, strengths: list[int]) -> MethodMemory | None:
        settings = self.settings
        for change in self._changes(strengths):
            settings = replace(settings, **change.settings)
        from hybrid_lightning.memory.pass_memory import Traces  # imports PEFT, which is slow

        alike = (settings.keep_start_weights, settings.gradient_checkpointing, settings.quantization, settings.lora)
        try:
            return plan_method(settings, self.sharding, traces=self._traces.setdefault(alike, Traces(settings)))
        except (ConfigError, ModelError):
            if not any(strengths):
                raise
            return None  # prompts that cannot be split, and the like


def _kinds(settings: RunSettings, sharding: Sharding, needs_reference: bool) -> list[tuple[Sequence[str] | None, list[Change]]]:
    """In the order of what they cost: phases that each kind is for (None: all), and stronger and stronger forms of it."""
    start_weights, checkpointing, budget, rank = [], [], [], []
    if settings.keep_start_weights and not needs_reference:
        cost = "nothing: no KL term needs them"
        start_weights = [Change.of("adapter.keep_start_weights", "false", cost, keep_start_weights=False)]
    together = [
        Change.of("data.eval_batch_size", count, "time, in validations", eval_prompts=count)
        for count in _halves(settings.eval_prompts, 1)
    ]
    cost = "fewer problems in each step, so more steps for as many"
    prompts = [
        Change.of("model.prompts_per_rollout", count, cost, prompts_per_rollout=count)
        for count in _halves(settings.prompts_per_rollout, max(_FEWEST_PROMPTS, sharding.devices))
    ]
    micro_batch = [
        Change.of("model.max_tokens_per_micro_batch", tokens, "a little time, in updates", max_tokens_per_micro_batch=tokens)
        for tokens in _halves(settings.tokens_of_pass(), settings.prompt_tokens + settings.completion_tokens)
    ]
    if not settings.gradient_checkpointing:
        cost = "a third more time, in updates"
        checkpointing = [Change.of("model.gradient_checkpointing", "true", cost, gradient_checkpointing=True)]
    if settings.plan is None and isinstance(settings.budget, ModuleBudget):
        cost = "what full training of these modules gains over LoRA"
        shares = [share for share in (0.5, 0.1, 0.05, 0.0) if share < settings.budget.share]
        budget = [Change.of("adapter.budget.share", share, cost, budget=ModuleBudget(share)) for share in shares]
    if settings.plan is None and not settings.rank_pattern:
        for lora in map(settings.lora.with_rank, _halves(settings.lora.rank, _FEWEST_RANKS)):
            options = (f"--adapter.rank={lora.rank}", f"--adapter.alpha={lora.alpha:g}")
            rank.append(Change(options, "capacity of LoRA", {"lora": lora}))
    return [
        *((None, start_weights), (("validating",), together), (("generating", "calibrating"), prompts)),
        *((_UPDATING, micro_batch), (_UPDATING, checkpointing)),
        *((None, _optimizer(sharding)), (None, _quantization(settings, sharding)), (None, budget), (None, rank)),
    ]


def _optimizer(sharding: Sharding) -> list[Change]:
    if isinstance(sharding, FSDP2):  # which cannot split its state
        return []
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        return []
    cost = "a little exactness, in the optimizer's state"
    return [Change.of("model.optimizer", "bitsandbytes.optim.AdamW8bit", cost, optimizer=AdamW8bit)]


def _quantization(settings: RunSettings, sharding: Sharding) -> list[Change]:
    if settings.quantization is not None or not sharding.whole_on_every_device or not settings.mixed_precision:
        return []
    try:
        from hybrid_lightning.model.quantization import NF4

        return [Change.of("model.quantization", "NF4", "exactness of the frozen weights, and time", quantization=NF4())]
    except ConfigError:
        return []


def _total(method: MethodMemory, phase: str) -> float:
    return method.peaks[phase].total if phase in method.peaks else 0.0


def _halves(count: int, least: int) -> Iterator[int]:
    """Half of a number, half of that, and so on, but none below the least."""
    while count // 2 >= least:
        count //= 2
        yield count
