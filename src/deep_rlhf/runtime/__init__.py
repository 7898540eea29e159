"""Processes, precision, optimisers, checkpoints and run folders."""
