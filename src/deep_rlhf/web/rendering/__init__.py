"""Templates and rendered text."""
