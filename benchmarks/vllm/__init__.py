"""What makes completions: our sampler, vLLM, transformers."""
