"""Problems and prompts: sources read problems, formats turn them into prompts, and a LightningDataModule serves them."""

from hybrid_lightning.shared.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, __file__)
