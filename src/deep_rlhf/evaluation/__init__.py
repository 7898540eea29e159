"""Comparison of policies, metrics of reward models, reports."""
