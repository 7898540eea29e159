"""The training loop that learns from people."""
