"""`EngineShare`: memory that a rollout engine in the training process takes on the training device, and whether both fit.

On a GPU vLLM takes `gpu_memory_utilization` of the device's whole memory, for weights, KV cache and activations. Its sleep mode
frees the cache, or everything, while the policy is updated (docs.vllm.ai: "Conserving memory", "Sleep Mode"). On a CPU it takes
its weights and a cache of a size that we choose, and frees nothing. Servers run on other devices.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from hybrid_lightning.memory.settings import RunSettings
from hybrid_lightning.memory.sizes import format_bytes
from hybrid_lightning.rollout.vllm.in_process import VLLMSampler, cache_bytes_of_token

CONTEXT_BYTES = 2**29  # of a GPU's memory, for its context and torch's code
# Reduces training's memory, or moves the engine to other devices.
_OTHER_REMEDIES = (
    "quantize the base (model.quantization), split it over devices (trainer.strategy), or let servers on other devices sample "
    "(model.sampler=VLLMServerSampler)"
)


@dataclass(frozen=True)
class EngineShare:
    """Bytes of a device that a rollout engine takes."""

    weights: float = 0.0
    sampling: float = 0.0  # total while it samples
    updating: float = 0.0  # kept while the policy is updated
    least: float = 0.0  # weights, and the KV cache of one completion


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


def misfit(settings: RunSettings, share: EngineShare, training: Mapping[str, tuple[float, bool]]) -> str | None:
    """Why training and an engine do not fit on a GPU together, with the remedy; None if they do, or there is no engine.

    `training` maps each phase of the run to the bytes that training takes, and whether the engine samples.
    """
    sampler, device = settings.sampler, settings.flags.device_bytes
    if settings.flags.on_cpu or device is None or not isinstance(sampler, VLLMSampler):
        return None
    room = device - CONTEXT_BYTES
    where = f"of {format_bytes(room)} ({format_bytes(device)} without the GPU's context)"
    given = f"sampler.gpu_memory_utilization={sampler.gpu_memory_utilization}"
    resting = max(taken for taken, samples in training.values() if samples)
    largest = math.floor(100 * (room - resting) / device) / 100
    smallest = math.ceil(100 * share.least / device) / 100
    change = "set sampler.gpu_memory_utilization={}" if 0 < smallest <= largest < 1 else _OTHER_REMEDIES
    if share.sampling < share.least:
        return (
            f"{given} of {format_bytes(device)} is less than the engine's weights with the KV cache of one completion, "
            f"{format_bytes(share.least)}; {change.format(smallest)}"
        )
    if resting + share.sampling > room:
        return (
            f"{given} does not fit: while completions are sampled, training keeps {format_bytes(resting)} and the engine takes "
            f"{format_bytes(share.sampling)}, {where}; {change.format(largest)}"
        )
    taken, phase = max((taken, phase) for phase, (taken, samples) in training.items() if not samples)
    if share.updating and taken + share.updating > room:
        frees = {"kv_cache": share.weights, "weights": 0.0} if sampler.sleep == "nothing" else {"weights": 0.0}
        fitting = [sleep for sleep, kept in frees.items() if taken + kept <= room]
        remedy = f"set sampler.sleep={fitting[0]}" if fitting else f"lower model.max_tokens_per_micro_batch, {_OTHER_REMEDIES}"
        return (
            f"sampler.sleep={sampler.sleep} does not fit: while {phase}, training takes up to {format_bytes(taken)} and the "
            f"engine keeps {format_bytes(share.updating)}, {where}; {remedy}"
        )
    return None
