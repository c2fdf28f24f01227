"""The study: whether the method works, and at what cost (see results/README.md)."""

import logging

# Advice about 4-bit kernels, which every process of the study would give again.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
