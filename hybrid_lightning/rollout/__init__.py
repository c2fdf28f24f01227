"""Rollouts: sample completions of prompts, and turn them into micro-batches of training data.

prompt_order.py       the order in which training prompts are drawn
sampler.py            samples completions in this process
interface.py          the request to an engine, and the policy's weights and model as an engine sees them
rollout_engine.py     the interface of everything that samples completions, and of episodes that continue turn by turn
future.py             a rollout in progress
vllm/                 samples completions with vLLM
rng.py                random numbers of the sampler, and random states for checkpoints
dynamic_sampling.py   replaces groups that teach nothing
loader.py             the train dataloader: draws prompts, requests rollouts, and yields micro-batches
batching.py           pads, splits, joins and saves rows
"""

from hybrid_lightning.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, __file__)
