"""Reward modelling on preference pairs: the original program's command, see README.md."""

from deep_rlhf.cli.main import run

if __name__ == "__main__":
    run("reward")
