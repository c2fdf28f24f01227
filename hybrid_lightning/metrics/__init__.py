"""How well a policy solves problems: avg@n, pass@k and maj@k with confidence intervals, for each named set of problems."""

from hybrid_lightning.shared.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, __file__)
