"""Hybrid-LoRA post-training of language models with verifiable rewards, as PyTorch Lightning modules and callbacks."""
