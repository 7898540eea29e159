"""Refits the reward model to the labels in the store."""
