"""Hybrid-LoRA post-training of language models with verifiable rewards, as PyTorch Lightning modules and callbacks."""

from hybrid_lightning.shared.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, __file__)
