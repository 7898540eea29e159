"""Predicts the memory of a run before anything is loaded."""
