"""CPU kernels in C++ for what torch does by several operations, each of which goes through memory once.

On a CPU half of the time of decoding a token went into some hundred small operations beside the products with weights. The
kernels are compiled once, for the processor at hand (`build.py`). `operators.py` calls them with
tensors. Where there are none, for want of a compiler, on another system or on an accelerator, callers compute the same with
torch.
"""
