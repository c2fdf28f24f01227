"""Environments that a policy acts in over several turns, such as callable tools or a game.

environment.py        the contract: `start`, `step`, `close`
running.py            the environments of a rollout, run concurrently, with limits
running_episode.py    one episode, restarted after a fault
objects.py            environments in this process
workers.py            environments in other processes
answers.py            checks the answers of environments
by_set.py             an environment for each set of the data
tool_environment.py   an environment of tools that the policy may call
tool.py               the base class of tools, and the checks of their arguments
calls.py              how the policy writes calls: the contract of call formats
json_calls.py         call formats in JSON or plain text
tagged_calls.py       call formats with tags, and the choice of a format by chat template
mcp_tools.py          the tools of an MCP server
tools.py              a calculator, a Python session, search over documents
foreign.py            environments of other packages: Gymnasium's API, OpenEnv
trl_environment.py    TRL's environment classes
games.py              guessing a number, several attempts at a problem
"""

from hybrid_lightning.shared.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, __file__)
