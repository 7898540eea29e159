"""Training from a fixed data set: SFT, reward models, DPO."""
