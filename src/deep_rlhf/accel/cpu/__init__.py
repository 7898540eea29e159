"""Faster code for CPUs; `switch` says which of it works here, and plain PyTorch is the fallback for the rest."""
