"""Compares engines that make completions: our sampler, vLLM, transformers."""
