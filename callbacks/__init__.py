"""Lightning callbacks, imported as `hybrid_lightning.callbacks` (a link to this folder)."""

from hybrid_lightning.shared.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, __file__)
