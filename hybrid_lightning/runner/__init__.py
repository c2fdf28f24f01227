"""Fast passes of a model: packing, attention, decoding, fused layers, log-probabilities. `cpu/` has kernels in C++.

The rest of the project imports the names below, above all `ModelRunner`. They are imported lazily: some need PEFT, which takes a
second to import.
"""

from hybrid_lightning.shared.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, __file__)
