"""Rollouts: sample completions of prompts, and turn them into micro-batches of training data.

prompt_order.py       in which order training prompts are drawn
sampler.py            samples completions
interface.py          what an engine is asked, and what it is told of weights and model
rollout_engine.py     the interface of all that samples completions, and of episodes that continue turn by turn
future.py             a rollout in progress
vllm/                 samples completions by vLLM
rng.py                random numbers of the sampler, and random states for checkpoints
dynamic_sampling.py   replaces groups from which nothing can be learned
loader.py             the train dataloader: draws prompts, asks for rollouts, and yields micro-batches
batching.py           pads, splits, joins and saves rows
"""

from hybrid_lightning.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, __file__)
