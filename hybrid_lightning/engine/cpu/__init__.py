"""Loops over numbers for CPUs, where torch would need several operations and as many passes over memory.

On a CPU half of the time of decoding a token went into some hundred small operations beside the products with weights. These
kernels are C++, compiled once for the processor at hand (`library.py`); `calls.py` has their functions of tensors. Where they
cannot be had - no compiler, another system, an accelerator - callers compute the same with torch.
"""
