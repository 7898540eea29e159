"""Policy, reference, critic and reward model."""
