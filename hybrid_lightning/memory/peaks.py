"""Plan the memory of a run at the peaks of its phases, for full fine-tuning, LoRA and hybrid.

What a device holds is in `strategies.py`, and what it computes in between in `pass_memory.py`.
"""

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

from hybrid_lightning.adapters.budgets import Budget, ModuleBudget, plan_of_budget
from hybrid_lightning.adapters.candidates import find_candidates
from hybrid_lightning.adapters.plan import AdapterPlan
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.memory.engine_share import EngineShare, engine_share, misfit
from hybrid_lightning.memory.process_growth import Growth, process_growth
from hybrid_lightning.memory.settings import RunSettings
from hybrid_lightning.memory.sizes import FLOAT32_BYTES, ModelSizes, OptimizerBytes, measure_sizes, optimizer_bytes
from hybrid_lightning.memory.strategies import FSDP1, PASS, Components, Sharding
from hybrid_lightning.model.pretrained import meta_model
from hybrid_lightning.rollout.loader import RolloutSchedule
from hybrid_lightning.rollout.rollout_engine import check_positions

if TYPE_CHECKING:
    from hybrid_lightning.memory.pass_memory import Traced, Traces

_SAMPLING = ("calibrating", "generating", "validating")  # phases in which completions are sampled


@dataclass(frozen=True)
class MethodMemory:
    """Planned memory of one method: full fine-tuning, LoRA or hybrid."""

    method: str
    parameters: int  # of the base model
    trainable: int  # parameters that are trained
    peaks: dict[str, Components]  # phase of the run -> memory at its peak
    host: float = 0.0  # bytes in the memory of the host that would otherwise be on the device
    growth: Growth | None = None  # of the process, on a CPU
    share: EngineShare = field(default_factory=EngineShare)  # what a rollout engine takes of the peaks

    @property
    def peak_phase(self) -> str:
        """Phase with the largest peak."""
        return max(self.peaks, key=lambda phase: self.peaks[phase].total)

    @property
    def peak_bytes(self) -> float:
        """Bytes at the largest peak."""
        return self.peaks[self.peak_phase].total

    @property
    def growth_bytes(self) -> float:
        """Bytes by which a process on a CPU grows: its tensors, and what comes with them."""
        assert self.growth is not None, "only on a CPU do tensors lie in the memory of the process"
        return self.growth.total

    @property
    def largest_components(self) -> Components:
        """Each component at its largest; they need not be that large at the same time."""
        names = (entry.name for entry in fields(Components))
        return Components(**{name: max(getattr(peak, name) for peak in self.peaks.values()) for name in names})


def plan_memory(settings: RunSettings, sharding: Sharding) -> list[MethodMemory]:
    """Plan the memory that full fine-tuning, LoRA and hybrid take on a device.

    Of several devices it is the first, which alone scores the modules. Completions are taken to have full length, every row to
    have an advantage, and the budget to choose the largest modules. So the result is an upper bound for any run, and what a run
    with such completions takes.

    Returns:
        The methods: full fine-tuning, LoRA, and the run's own plan or budget if it is neither of them.

    Raises:
        ConfigError: If the prompts cannot be split evenly over the devices, or the optimizer cannot make a step on a CPU.
        ModelError: If the model cannot be traced.
    """
    _check(settings, sharding)
    run = _Run(settings, sharding)
    return [run.method(name, budget) for name, budget in _budgets(settings).items()]


def plan_method(settings: RunSettings, sharding: Sharding, traces: "Traces | None" = None) -> MethodMemory:
    """Plan the run's own method alone; errors as of `plan_memory`.

    `traces` may be those of settings that differ in numbers of prompts and tokens, budget or optimizer alone; None makes them.
    """
    _check(settings, sharding)
    name = own_method(settings)
    return _Run(settings, sharding, traces).method(name, _budgets(settings)[name])


def own_method(settings: RunSettings) -> str:
    """The name of the run's own method."""
    *_, last = _budgets(settings)
    return last if settings.plan is not None else {0.0: "LoRA", 1.0: "FFT"}.get(settings.budget.share, last)


def why_not_fitting(settings: RunSettings, method: MethodMemory) -> str | None:
    """Why a run and its rollout engine do not fit on a GPU together, with the remedy, in one line; None if they do."""
    peaks = {phase: (peak.total - peak.engine, phase in _SAMPLING) for phase, peak in method.peaks.items()}
    return misfit(settings, method.share, peaks)


def _budgets(settings: RunSettings) -> dict[str, Budget]:
    """Name and budget of each method."""
    budgets: dict[str, Budget] = {"FFT": ModuleBudget(1.0), "LoRA": ModuleBudget(0.0)}
    share = settings.budget.share
    if settings.plan is not None:
        budgets["plan"] = settings.budget
    elif 0 < share < 1:
        budgets[f"hybrid {share:.0%}"] = settings.budget
    return budgets


def _check(settings: RunSettings, sharding: Sharding) -> None:
    """Refuse settings that `fit` would refuse."""
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
    """A run, with what does not depend on the method."""

    def __init__(self, settings: RunSettings, sharding: Sharding, traces: "Traces | None" = None) -> None:
        self.settings, self.sharding = settings, sharding
        self.optimizer: OptimizerBytes = optimizer_bytes(settings.optimizer, settings.trained_dtype)
        self.candidates = find_candidates(meta_model(settings.config, settings.dtype), settings.target_modules)
        self.prompts = settings.prompts_per_rollout // sharding.devices
        from hybrid_lightning.memory.pass_memory import Traces  # imports PEFT, which is slow

        self.traces = traces or Traces(settings)
        self.generated = {"generating": (self.prompts, settings.samples_per_prompt)}  # phase -> prompts, completions of each
        if settings.eval_prompts:
            self.generated["validating"] = (settings.eval_prompts, settings.eval_samples)

    def method(self, name: str, budget: Budget) -> MethodMemory:
        """Peaks of all phases with one method."""
        settings = self.settings
        given = settings.plan if name == "plan" else None
        plan: AdapterPlan = given or plan_of_budget(self.candidates, budget, settings.lora, settings.rank_pattern)
        sizes = measure_sizes(settings, plan)
        peaks = {phase: self._generating(sizes, *counts) for phase, counts in self.generated.items()}
        if given is None and budget.needs_scores:
            peaks |= self._scoring(sizes)
        peaks |= self._updating(sizes)
        share = engine_share(settings, sizes.parameters)
        peaks = {
            phase: replace(peak, engine=share.sampling if phase in _SAMPLING else share.updating) for phase, peak in peaks.items()
        }
        host = self.sharding.host(sizes, self.optimizer.state)
        memory = MethodMemory(name, sizes.parameters, sizes.trainable, peaks, host, share=share)
        return replace(memory, growth=self._growth(memory, sizes)) if settings.on_cpu else memory

    def _budgeted(self, weights: float, trained: float) -> RunSettings:
        """The settings with the token budget that a device has beside its bytes of weights and its number of trained ones."""
        return replace(self.settings, max_tokens_per_micro_batch=self.settings.tokens_of_pass(weights, trained))

    def _growth(self, memory: MethodMemory, sizes: ModelSizes) -> Growth:
        """Growth of the process in the phase in which it is largest."""
        batches = set(self.generated.values())
        if "validating" in self.generated:
            batches.add((self.settings.eval_prompts, 1))  # the greedy completions
        if "calibrating" in memory.peaks:
            batches.add((self._calibration_batch, self.settings.samples_per_prompt))
        if self.settings.sampler.needs_weight_sync:
            batches.clear()  # which others complete
        found = []
        for phase, peak in memory.peaks.items():
            # The model as it was loaded is in the file that it was read from until it is split.
            split = not self.sharding.whole_on_every_device and phase not in ("calibrating", "scoring")
            found.append(process_growth(self.settings, sizes, peak.total, batches, split, memory.share))
        return max(found, key=lambda growth: growth.total)

    @property
    def _calibration_batch(self) -> int:
        """Calibration prompts that are completed together."""
        from hybrid_lightning.training.calibration import calibration_batch  # as above

        return min(self.settings.scored_prompts, calibration_batch(self.settings.prompts_per_rollout))

    def _generating(self, sizes: ModelSizes, prompts: int, samples: int) -> Components:
        if self.settings.sampler.needs_weight_sync:
            return self.sharding.held("resting", sizes, self.optimizer.state)
        held = self.sharding.held("generating", sizes, self.optimizer.state)
        return _computing(held, self.traces.decoding(prompts, samples, sizes.share_full))

    def _scoring(self, sizes: ModelSizes) -> dict[str, Components]:
        """Peaks of calibrating and scoring, where devices have the base model as loaded, or a share of it, and nothing else."""
        settings, devices = self.settings, self.sharding.scoring_devices
        base = sizes.parameters * settings.dtype.itemsize
        prompts = settings.scored_prompts
        passes = self.sharding.held_to_score("scoring", sizes, base)
        # On CPUs the model as it was loaded, from which the shares are made, is in the same memory.
        loaded = base if settings.on_cpu and devices > 1 else 0.0
        if settings.sampler.needs_weight_sync:
            calibrating = passes
        else:
            generated = self.traces.decoding(self._calibration_batch, settings.samples_per_prompt, None)
            calibrating = _computing(self.sharding.held_to_score("calibrating", sizes, base), generated)
        calibrating = replace(calibrating, weights=calibrating.weights + loaded)
        from hybrid_lightning.memory.pass_memory import passes_of_scoring  # as above

        # The sums of gradients are kept in the memory of the host; devices that score together have a pass's gradients as well.
        sums = settings.scoring_copies * FLOAT32_BYTES * sizes.candidates / devices if settings.on_cpu else 0.0
        of_pass = settings.dtype.itemsize * sizes.candidates / devices if devices > 1 else 0.0
        held = replace(passes, weights=passes.weights + loaded, gradients=sums + of_pass)
        # Rows all have the same length, so that the pass with most rows has most tokens.
        longest = max(passes_of_scoring(self._budgeted(passes.weights, 0.0), prompts), key=len)
        return {"calibrating": calibrating, "scoring": _largest((held, held, held), self.traces.update(longest, None))}

    def _updating(self, sizes: ModelSizes) -> dict[str, Components]:
        """Peaks of updating and, on an accelerator, of the optimizer step.

        Gradients of the previous step are cleared before the backward pass of a micro-batch, or, where a micro-batch takes
        several passes, before the first of them. With gradient accumulation, micro-batches after the first of a step run beside
        the gradients of earlier ones.
        """
        from hybrid_lightning.memory.pass_memory import passes_of_step  # as above

        sharding, state = self.sharding, self.optimizer.state
        begin, forward, backward = (sharding.held(moment, sizes, state) for moment in PASS)
        devices = 1 if sharding.whole_on_every_device else sharding.devices
        budgeted = self._budgeted(sizes.weight_bytes / devices, sizes.trainable / devices)
        first, *others = passes_of_step(budgeted, self.prompts)
        cleared = [replace(held, gradients=0) for held in (begin, forward, backward)]
        if self.settings.accumulate_grad_batches > 1:
            stages = (begin, forward, backward)
        else:
            stages = (cleared[0], cleared[1], cleared[2]) if others else (begin, forward, cleared[2])
        peaks = [_largest(stages, self.traces.update(first, sizes.share_full))]
        if others:
            longest = self.traces.update(max(others, key=len), sizes.share_full)
            peaks.append(_largest((begin, forward, backward), longest))
        updating = {"updating": max(peaks, key=lambda peak: peak.total)}
        step = self.optimizer.step * sizes.trainable / devices
        if step and not self.settings.on_cpu and not sharding.cpu_offload:
            optimizer = forward.optimizer + step
            updating["optimizer step"] = Components(forward.weights, gradients=forward.gradients, optimizer=optimizer)
        return updating


def _largest(stages: tuple[Components, Components, Components], traced: "Traced") -> Components:
    """Peak of a pass: at its beginning, at the end of its forward pass, or in its backward pass."""
    begin, forward, backward = stages
    nothing = replace(traced, activations=0.0, logits=0.0)
    peaks = [
        _computing(begin, nothing),
        _computing(forward, traced),
        _computing(backward, replace(nothing, activations=traced.backward)),
    ]
    return max(peaks, key=lambda peak: peak.total)


def _computing(held: Components, traced: "Traced") -> Components:
    """What a device holds together with what a pass computes."""
    return replace(held, packed=traced.packed, activations=traced.activations, cache=traced.cache, logits=traced.logits)
