"""The policy model, without a Trainer."""
