"""What makes a model's passes fast: packing, attention, decoding, fused layers, log-probabilities; `cpu/` for CPUs, in C++."""
