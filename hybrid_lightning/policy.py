"""Public names of what trains a policy, as configs and checkpoints hold them: the rooms `model/` and `training/`."""

from hybrid_lightning.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, __file__)
