"""The policy: a causal language model as a LightningModule."""
