"""Hybrid-LoRA adapters: score the candidate modules, plan which are fully trained, apply the plan with PEFT, show it."""

from hybrid_lightning.shared.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, __file__)
