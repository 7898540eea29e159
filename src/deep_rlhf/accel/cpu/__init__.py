"""Faster CPU kernels, with plain PyTorch as the fallback."""
