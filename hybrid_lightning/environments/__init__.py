"""Environments: what a policy acts in over several turns, such as tools that it may call, or a game.

environment.py   the contract: `start`, `step`, `close`
"""

from hybrid_lightning.environments.environment import Environment, Step

__all__ = ["Environment", "Step"]
