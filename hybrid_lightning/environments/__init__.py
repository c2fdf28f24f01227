"""Environments: what a policy acts in over several turns, such as tools that it may call, or a game.

environment.py        the contract: `start`, `step`, `close`
running.py            the environments of a rollout, side by side, with their bounds and faults
local_episodes.py     where they run: in this process
workers.py            or in others
answers.py            checks what they answer
tool_environment.py   an environment of tools that the policy may call
calls.py              how it writes calls
"""

from hybrid_lightning.environments.calls import Call, CallFormat, HermesCalls, LlamaCalls, MalformedCall, PlainCalls
from hybrid_lightning.environments.environment import CUT_MARK, Environment, Step
from hybrid_lightning.environments.local_episodes import Failure, Started, TimedOut
from hybrid_lightning.environments.running import EpisodeLimits, RunningEpisodes
from hybrid_lightning.environments.tool_environment import Tool, ToolEnvironment

__all__ = [
    "CUT_MARK",
    "Call",
    "CallFormat",
    "Environment",
    "EpisodeLimits",
    "Failure",
    "HermesCalls",
    "LlamaCalls",
    "MalformedCall",
    "PlainCalls",
    "RunningEpisodes",
    "Started",
    "Step",
    "TimedOut",
    "Tool",
    "ToolEnvironment",
]
