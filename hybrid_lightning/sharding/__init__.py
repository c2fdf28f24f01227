"""Training over several processes: communication, strategies that split the model, and checkpoints that all strategies read."""

from hybrid_lightning.shared.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, __file__)
