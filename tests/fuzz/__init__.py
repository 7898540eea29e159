"""Commands on damaged input, chosen by a seed: `make fuzz` runs them, and says what is wrong with how they end."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "cli")]  # for fixtures.py and processes.py
