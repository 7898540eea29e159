"""Samples responses and computes the log-probabilities of their tokens."""
