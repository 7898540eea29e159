"""Chooses which questions people are asked."""
