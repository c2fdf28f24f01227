"""Rollouts: sample completions of prompts, and turn them into micro-batches of training data.

prompt_order.py       the order in which training prompts are drawn
sampler.py            samples completions in this process
interface.py          the request to an engine, and the policy's weights and model as an engine sees them
rollout_engine.py     the interface of everything that samples: engines in this process, and engines with a copy of the weights
playing.py            when the messages of episodes are sampled: in rounds, or at once
future.py             a rollout in progress elsewhere
vllm/                 samples completions with vLLM
rng.py                random numbers of the sampler, and random states for checkpoints
dynamic_sampling.py   replaces groups that teach nothing
loader.py             the train dataloader: draws prompts, requests rollouts, and yields micro-batches
batching.py           pads, splits, joins and saves rows
"""

from hybrid_lightning.shared.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, __file__)
