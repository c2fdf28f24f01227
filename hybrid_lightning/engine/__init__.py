"""What makes a model's passes fast: packing, attention, decoding, fused layers, log-probabilities; in `cpu/`, kernels in C++.

The other parts of the project use the names below, above all `Engine`. A name is imported at its first use, since some need PEFT,
which takes a second to import.
"""

from hybrid_lightning.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, __file__)
