"""Rollouts: sample completions of prompts, and turn them into micro-batches of training data.

prompt_order.py       in which order training prompts are drawn
sampler.py            samples completions
interface.py          what an engine is asked, and what it is told of weights and model
rollout_engine.py     the interface of all that samples completions, and of episodes that continue turn by turn
future.py             a rollout in progress
run_state.py          what rollouts have to know of the run
vllm/                 samples completions by vLLM
rng.py                random numbers of the sampler, and random states for checkpoints
dynamic_sampling.py   replaces groups from which nothing can be learned
loader.py             the train dataloader: draws prompts, asks for rollouts, and yields micro-batches
batching.py           pads, splits, joins and saves rows
"""

from typing import TYPE_CHECKING

from hybrid_lightning.configurable import public_names

if TYPE_CHECKING:
    from hybrid_lightning.rollout.dynamic_sampling import DynamicSampling
    from hybrid_lightning.rollout.loader import RolloutLoader, RolloutSchedule
    from hybrid_lightning.rollout.rollout_engine import RolloutEngine
    from hybrid_lightning.rollout.sampler import Sampler
    from hybrid_lightning.rollout.vllm.in_process import VLLMSampler
    from hybrid_lightning.rollout.vllm.servers import VLLMServerSampler

__all__ = [
    "DynamicSampling",
    "RolloutEngine",
    "RolloutLoader",
    "RolloutSchedule",
    "Sampler",
    "VLLMSampler",
    "VLLMServerSampler",
]

__getattr__ = public_names(
    __name__,
    {
        "dynamic_sampling": ["DynamicSampling"],
        "loader": ["RolloutLoader", "RolloutSchedule"],
        "rollout_engine": ["RolloutEngine"],
        "sampler": ["Sampler"],
        "vllm.in_process": ["VLLMSampler"],
        "vllm.servers": ["VLLMServerSampler"],
    },
)
