"""Plan the memory of a run at the peaks of its phases, for full fine-tuning, LoRA and hybrid.

`strategies.py` has the weights and state that a device holds, `engine/pass_memory.py` the memory of its passes.
"""

from dataclasses import dataclass, field, fields, replace

import torch

from hybrid_lightning.adapters.budgets import ModuleBudget, plan_of_budget
from hybrid_lightning.adapters.candidates import find_candidates
from hybrid_lightning.adapters.gradients import ExactGradients
from hybrid_lightning.memory.settings import RunSettings
from hybrid_lightning.memory.sizes import FLOAT32_BYTES, ModelSizes, measure_sizes
from hybrid_lightning.memory.strategies import Components, Moment
from hybrid_lightning.model.loading import DTYPES
from hybrid_lightning.model.pretrained import meta_model
from hybrid_lightning.rollout.batching import split_by_tokens
from hybrid_lightning.rollout.rollout_engine import WeightedEngine, check_length, model_context
from hybrid_lightning.rollout.vllm.in_process import VLLMSampler, cache_bytes_of_token
from hybrid_lightning.runner import PassBytes, Rows
from hybrid_lightning.training.optim import optimizer_bytes
from hybrid_lightning.types import Sequences

SAMPLING = ("calibrating", "generating", "validating")  # phases in which completions are sampled
# A process on a CPU also has Python and its libraries, and gaps, as a share of its tensors (`benchmarks/memory`).
PROCESS_BYTES, _GAPS = 580 * 2**20, 0.15
CONTEXT_BYTES = 2**29  # of a GPU's memory, for its context and torch's code


@dataclass(frozen=True)
class EngineShare:
    """Bytes of the training device that a rollout engine in the training process takes.

    On a GPU vLLM takes `gpu_memory_utilization` of the device's whole memory, for weights, KV cache and activations. Its sleep
    mode frees the cache, or everything, while the policy is updated (docs.vllm.ai: "Conserving memory", "Sleep Mode"). On a CPU
    it takes its weights and a cache of a size that we choose, and frees nothing. Servers run on other devices.
    """

    weights: float = 0.0
    sampling: float = 0.0  # total while it samples
    updating: float = 0.0  # kept while the policy is updated
    least: float = 0.0  # weights, and the KV cache of one completion


@dataclass(frozen=True)
class MethodMemory:
    """Planned memory of one method: full fine-tuning, LoRA or hybrid."""

    method: str
    parameters: int  # of the base model
    trainable: int  # parameters that are trained
    peaks: dict[str, Components]  # phase of the run -> memory at its peak
    host: float = 0.0  # bytes offloaded from the device to the memory of the host
    share: EngineShare = field(default_factory=EngineShare)  # a rollout engine's share of the peaks
    bounds: tuple[str, ...] = ()  # parts that are upper bounds rather than predictions, worded for the user
    passes: int = 0  # forward and backward passes in the updates of one rollout
    gathered: float = 0.0  # bytes of weights that a device receives from others in these passes

    @property
    def peak_phase(self) -> str:
        """Phase with the largest peak."""
        return max(self.peaks, key=lambda phase: self.peaks[phase].total)

    @property
    def peak_bytes(self) -> float:
        """Bytes of all tensors at the largest peak."""
        return self.peaks[self.peak_phase].total

    @property
    def process_bytes(self) -> float:
        """Bytes of a process on a CPU at the largest peak."""
        return PROCESS_BYTES + (1 + _GAPS) * self.peak_bytes

    @property
    def largest_components(self) -> Components:
        """The largest value of each component over all phases; they may be reached at different times."""
        names = (entry.name for entry in fields(Components))
        return Components(**{name: max(getattr(peak, name) for peak in self.peaks.values()) for name in names})


def plan_memory(settings: RunSettings) -> list[MethodMemory]:
    """Plan the memory that full fine-tuning, LoRA and hybrid take on the first device.

    The plan assumes completions of full length, an advantage for every row, and a budget that chooses the largest modules. So the
    result is an upper bound for any run, and a prediction for a run with such completions.

    Returns:
        The methods: full fine-tuning, LoRA, and the run's own plan or budget if it is neither of them.

    Raises:
        ConfigError: If the prompts cannot be split evenly over the devices, or the optimizer cannot run on a CPU.
        ModelError: If transformers does not have the model, or nothing in it can be adapted.
    """
    run = _PlannedRun(settings)
    return [run.method(name) for name in dict.fromkeys(("FFT", "LoRA", own_method(settings)))]


def plan_method(settings: RunSettings) -> MethodMemory:
    """Plan only the run's own method; raises like `plan_memory`."""
    return _PlannedRun(settings).method(own_method(settings))


def own_method(settings: RunSettings) -> str:
    """The name of the run's own method."""
    share = settings.planning.budget.share
    return "plan" if settings.plan is not None else {0.0: "LoRA", 1.0: "FFT"}.get(share, f"hybrid {share:.0%}")


def engine_share(settings: RunSettings, parameters: int) -> EngineShare:
    """Memory that a run's engine takes on each device; zero if the policy itself or servers sample.

    An accelerator's memory must be known. The engine holds all `parameters` of the model, with LoRA merged.
    """
    sampler = settings.sampler
    if not isinstance(sampler, VLLMSampler):
        return EngineShare()
    dtype = settings.product_dtype
    weights = parameters * dtype.itemsize
    tokens = sampler.max_model_len or settings.prompt_tokens + settings.completion_tokens
    least = weights + tokens * cache_bytes_of_token(settings.config, dtype)
    if settings.flags.on_cpu:
        whole = weights + sampler.cache_bytes_on_cpu(settings.config, dtype)
        return EngineShare(weights, whole, whole, least)
    memory = settings.flags.device_bytes
    assert memory is not None, "the engine takes a share of the device's memory"
    whole = int(sampler.gpu_memory_utilization * memory)
    return EngineShare(weights, whole, {"nothing": whole, "kv_cache": weights, "weights": 0}[sampler.sleep], least)


class _PlannedRun:
    """A run, with everything that does not depend on the method."""

    def __init__(self, settings: RunSettings) -> None:
        from hybrid_lightning.runner import PassMemory  # imports PEFT, which is slow

        self.settings, self.sharding, self.on_cpu = settings, settings.flags.sharding, settings.flags.on_cpu
        settings.schedule.check_split(settings.flags.accumulate_grad_batches, self.sharding.devices)
        context = model_context(settings.config.get_text_config())
        check_length(settings.prompt_tokens, settings.completion_tokens, *context)
        self.optimizer = optimizer_bytes(settings.optimization.optimizer)
        self.model = meta_model(settings.config, settings.dtype)
        self.candidates = settings.planning.candidates(self.model)
        options = (settings.gradient_checkpointing, settings.entropy_gradient, settings.attention)
        self.passes = PassMemory(self.model, settings.product_dtype.itemsize, self.on_cpu, *options)
        self.prompts = settings.schedule.prompts_per_rollout // self.sharding.devices
        self.teacher, self.teacher_stays = 0, False
        if settings.teacher is not None:
            quantization, dtype = settings.teacher.quantization, DTYPES.get(settings.teacher.dtype or "", settings.dtype)
            model = meta_model(settings.teacher.pretrained.config, dtype)
            plan = plan_of_budget(find_candidates(model), ModuleBudget(0.0), settings.planning.lora)
            self.teacher = measure_sizes(model, plan, True, quantization).frozen_bytes  # all that is not LoRA
            self.teacher_stays = self.on_cpu or quantization is not None

    def method(self, name: str) -> MethodMemory:
        """Peaks of all phases with one method."""
        settings, planning = self.settings, self.settings.planning
        budget = {"FFT": ModuleBudget(1.0), "LoRA": ModuleBudget(0.0)}.get(name, planning.budget)
        plan = settings.plan if name == "plan" else None
        scored = plan is None and budget.needs_scores
        plan = plan or plan_of_budget(self.candidates, budget, planning.lora, planning.rank_pattern)
        sizes = measure_sizes(self.model, plan, settings.keep_start_weights, settings.quantization)
        peaks = {"generating": self._generating(sizes, self.prompts, settings.schedule.samples_per_prompt)}
        if settings.eval_prompts:
            peaks["validating"] = self._generating(sizes, settings.eval_prompts, settings.eval_samples)
        peaks |= self._scoring(sizes) if scored else {}
        updating, passes = self._updating(sizes)
        peaks |= updating
        share = engine_share(settings, sizes.parameters)
        for phase, peak in peaks.items():
            teacher = self.teacher if self.teacher_stays or phase in ("calibrating", "updating", "optimizer step") else 0
            peaks[phase] = replace(peak, teacher=teacher, engine=share.sampling if phase in SAMPLING else share.updating)
        host = self._part(sizes).total if self.sharding.cpu_offload else 0.0
        gathered = 2 * passes * sizes.weight_bytes * (1 - 1 / self.sharding.parts)
        return MethodMemory(name, sizes.parameters, sizes.trainable, peaks, host, share, self.passes.bounds, passes, gathered)

    def _rows(self, prompts: int, completions: int) -> Rows:
        return Rows(prompts, completions, self.settings.prompt_tokens, self.settings.completion_tokens)

    def _cut(self, prompts: int, tokens: int, micro_batches: int = 1) -> list[Rows]:
        """The passes of the first micro-batch of a rollout, as training cuts them, with all rows and full lengths."""
        settings, samples = self.settings, self.settings.schedule.samples_per_prompt
        number = torch.arange(prompts).repeat_interleave(samples)[:, None]
        number = number[: max(1, len(number) // micro_batches)]
        prompt_ids, completion_ids = (number.expand(-1, n) for n in (settings.prompt_tokens, settings.completion_tokens))
        prompt_mask, completion_mask = (torch.ones_like(ids, dtype=torch.bool) for ids in (prompt_ids, completion_ids))
        runs = split_by_tokens(Sequences(prompt_ids, prompt_mask, completion_ids, completion_mask), tokens)
        return [self._rows((run.stop - 1) // samples - run.start // samples + 1, run.stop - run.start) for run in runs]

    def _part(self, sizes: ModelSizes) -> Components:
        """A device's part of weights, gradients and optimizer state."""
        parts, state = self.sharding.parts, sizes.trainable * self.optimizer.state
        return Components(sizes.weight_bytes / parts, gradients=sizes.trained_bytes / parts, optimizer=state / parts)

    def _held(self, moment: Moment, sizes: ModelSizes) -> Components:
        """What a device holds, whatever it computes."""
        copies = self.sharding.copies(moment, sizes)
        if self.sharding.cpu_offload:
            return Components(copies=copies)
        if moment in ("calibrating", "scoring"):
            # On CPUs the loaded model, which is then split, is in the same memory.
            loaded = sizes.base_bytes if self.on_cpu and self.sharding.parts > 1 else 0.0
            return Components(sizes.base_bytes / self.sharding.parts + loaded, copies)
        return replace(self._part(sizes), copies=copies)

    def _generating(self, sizes: ModelSizes, prompts: int, samples: int) -> Components:
        if isinstance(self.settings.sampler, WeightedEngine):
            return self._held("resting", sizes)
        rows, sampler = self._rows(prompts, prompts * samples), self.settings.sampler
        found = self.passes.sampling(rows, sizes.trained, sampler.held_logits)
        return _computing(self._held("generating", sizes), found)

    def _scoring(self, sizes: ModelSizes) -> dict[str, Components]:
        """Peaks of calibrating and scoring: devices hold only the base model as loaded, or a part of it."""
        from hybrid_lightning.training.calibration import calibration_batch  # imports PEFT, as above

        settings, parts = self.settings, self.sharding.parts
        prompts = settings.planning.calibration_prompts or settings.schedule.prompts_per_rollout
        held = calibrating = self._held("scoring", sizes)
        if not isinstance(settings.sampler, WeightedEngine):
            batch = min(prompts, calibration_batch(settings.schedule.prompts_per_rollout))
            rows = self._rows(batch, batch * settings.schedule.samples_per_prompt)
            generated = self.passes.sampling(rows, None, settings.sampler.held_logits)
            calibrating = _computing(self._held("calibrating", sizes), generated)
        if self.on_cpu:
            # Exact gradients are summed up in the memory of the host. With several processes, each also holds the gradients of a
            # pass. Gathering them takes about as much again, little of it in tensors (measured).
            exact = isinstance(settings.planning.gradients, ExactGradients) and settings.planning.scorer.needs_gradient
            sent = 2 * settings.dtype.itemsize * sizes.candidates if parts > 1 else 0
            held = replace(held, gradients=exact * FLOAT32_BYTES * sizes.candidates / parts + sent)
        held = replace(held, gradients=held.gradients + settings.dtype.itemsize * sizes.experts_in_layer)  # one layer at a time
        passes = self._cut(prompts, settings.tokens_of_pass(sizes.base_bytes / parts + self.teacher))
        # All rows have the same length, so the pass with most rows has most tokens.
        longest = self.passes.training(max(passes, key=lambda rows: rows.completions), None)
        return {"calibrating": calibrating, "scoring": _largest((held, held, held), longest)}

    def _updating(self, sizes: ModelSizes) -> tuple[dict[str, Components], int]:
        """Peaks of updating and, on an accelerator, of the optimizer step; and the number of passes per rollout.

        Gradients of the previous step are cleared before the backward pass of a micro-batch, or before its first pass if it takes
        several. With gradient accumulation, later micro-batches of a step run while gradients of earlier ones exist.
        """
        settings, parts, accumulated = self.settings, self.sharding.parts, self.settings.flags.accumulate_grad_batches
        begin, forward, backward = (self._held(moment, sizes) for moment in ("begin", "forward", "backward"))
        tokens = settings.tokens_of_pass(sizes.weight_bytes / parts + self.teacher, sizes.trainable / parts)
        micro_batches = settings.schedule.minibatches_per_rollout * accumulated
        first, *others = self._cut(self.prompts, tokens, micro_batches)
        stages = (begin, forward, backward)
        if accumulated == 1:
            clear = [held if held is not backward and not others else replace(held, gradients=0.0) for held in stages]
            stages = (clear[0], clear[1], clear[2])
        peaks = [_largest(stages, self.passes.training(first, sizes.trained, settings.compared))]
        if others:
            later = max(others, key=lambda rows: rows.completions)
            peaks.append(_largest((begin, forward, backward), self.passes.training(later, sizes.trained, settings.compared)))
        updating = {"updating": max(peaks, key=lambda peak: peak.total)}
        step = self.optimizer.step * sizes.trainable / parts
        if step and not self.on_cpu and not self.sharding.cpu_offload:
            part = self._part(sizes)
            updating["optimizer step"] = replace(part, optimizer=part.optimizer + step)
        return updating, (1 + len(others)) * micro_batches * settings.schedule.epochs_per_rollout


def _largest(stages: tuple[Components, Components, Components], found: PassBytes) -> Components:
    """Peak of a pass: at its beginning, at the end of its forward pass, or in its backward pass."""
    begin, forward, backward = stages
    peaks = [begin, _computing(forward, found), replace(backward, activations=found.backward)]
    return max(peaks, key=lambda peak: peak.total)


def _computing(held: Components, found: PassBytes) -> Components:
    """What a device holds, plus the memory of a pass."""
    return replace(held, packed=found.packed, activations=found.activations, cache=found.cache, logits=found.logits)
