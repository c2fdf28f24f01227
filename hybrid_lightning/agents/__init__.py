"""Agents: programs of the user's that talk to the policy over an OpenAI-compatible endpoint.

agent.py      the contract, and the two kinds: a function, and a command in any language
endpoint.py   the endpoint: keys, limits, errors
dialects.py   what clients send and expect: chat completions, responses, messages

What an agent's requests mean in tokens is in `episodes/agent_episode.py`.
"""

from hybrid_lightning.shared.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, __file__)
