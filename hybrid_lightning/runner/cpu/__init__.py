"""CPU kernels in C++ that replace several torch operations, each with its own pass over memory.

On a CPU half of the time of decoding a token went into some hundred small operations besides the products with weights. The
kernels are compiled once, for this machine's processor (`build.py`). `operators.py` calls them with tensors. Without kernels (no
compiler, another system, an accelerator) callers use torch instead.
"""
