"""Verifiable rewards: scores of completions, computed by rules, tests and comparisons with a reference answer."""

from hybrid_lightning.shared.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, __file__)
