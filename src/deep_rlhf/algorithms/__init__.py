"""PPO and other policy-gradient methods; SFT, reward models, DPO."""
