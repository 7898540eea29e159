"""Fast paths that give the results of plain PyTorch."""
