from hybrid_lightning.agents.agent import Agent as Agent
from hybrid_lightning.agents.agent import CommandAgent as CommandAgent
from hybrid_lightning.agents.agent import FunctionAgent as FunctionAgent
