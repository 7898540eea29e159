"""Metrics and alarms of a training loop."""
