"""What the original's utils.py offered, for scripts that import it."""

from deep_rlhf.algorithms.online.config import ScriptArguments
from deep_rlhf.cli.flags import print_config

__all__ = ["ScriptArguments", "print_config"]
