"""Public names of the classes in `model/` and `training/`, as configs and checkpoints use them."""

from hybrid_lightning.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, __file__)
