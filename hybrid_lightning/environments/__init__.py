"""Environments: what a policy acts in over several turns, such as tools that it may call, or a game.

environment.py        the contract: `start`, `step`, `close`
running.py            the environments of a rollout, side by side, with their bounds and faults
local_episodes.py     where they run: in this process
process_state.py      what they may change for all of it, and how it is put back
workers.py            or in others
answers.py            checks what they answer
tool_environment.py   an environment of tools that the policy may call
calls.py              how it writes calls
tools.py              a calculator, Python with a session, search over documents
foreign.py            environments of other packages: Gymnasium's form, TextArena, SkyRL, TextWorld, OpenEnv
trl_environment.py    TRL's environment classes
games.py              a number to be guessed, several attempts at a problem, games that TextWorld makes
"""

from hybrid_lightning.environments.calls import Call, CallFormat, HermesCalls, LlamaCalls, MalformedCall, PlainCalls
from hybrid_lightning.environments.environment import CUT_MARK, Environment, Step
from hybrid_lightning.environments.foreign import (
    GymEnvironment,
    OpenEnvEnvironment,
    SkyRLEnvironment,
    TextArenaEnvironment,
    TextWorldEnvironment,
)
from hybrid_lightning.environments.games import GuessNumber, ReasoningGymEnvironment, textworld_game
from hybrid_lightning.environments.local_episodes import Failure, Started, TimedOut
from hybrid_lightning.environments.running import EpisodeLimits, RunningEpisodes
from hybrid_lightning.environments.tool_environment import Tool, ToolEnvironment
from hybrid_lightning.environments.tools import DocumentSearch, PythonSession, calculator
from hybrid_lightning.environments.trl_environment import TRLEnvironment

__all__ = [
    "CUT_MARK",
    "Call",
    "CallFormat",
    "DocumentSearch",
    "Environment",
    "EpisodeLimits",
    "Failure",
    "GuessNumber",
    "GymEnvironment",
    "HermesCalls",
    "LlamaCalls",
    "MalformedCall",
    "OpenEnvEnvironment",
    "PlainCalls",
    "PythonSession",
    "ReasoningGymEnvironment",
    "RunningEpisodes",
    "SkyRLEnvironment",
    "Started",
    "Step",
    "TRLEnvironment",
    "TextArenaEnvironment",
    "TextWorldEnvironment",
    "TimedOut",
    "Tool",
    "ToolEnvironment",
    "calculator",
    "textworld_game",
]
