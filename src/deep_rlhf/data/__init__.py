"""Reads preferences and prompts; contains the synthetic task."""
