"""Hybrid-LoRA post-training with verifiable rewards, as PyTorch Lightning parts."""
