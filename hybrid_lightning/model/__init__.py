"""What a policy is, without a Trainer."""
