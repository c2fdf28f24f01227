"""Trains policies: tasks, their steps and checkpoints, and the LightningModules."""

from hybrid_lightning.shared.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, __file__)
